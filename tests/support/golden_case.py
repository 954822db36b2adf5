"""A directory of golden numbers, laid out as `golden/small`, and the models that it describes."""

import functools
import json
from pathlib import Path

import jax
import numpy as np

from zegformer_jax import models
from zegformer_jax.models.clip.model import CLIP
from zegformer_jax.pretrained.clip.load import from_openai_state_dict
from zegformer_jax.pretrained.zegformer import from_checkpoint
from zegformer_jax.text.embeddings import embed_tokens, tokenize_classes
from zegformer_jax.text.prompts import load_templates
from zegformer_jax.text.tokenizer import Tokenizer

CLASSIFIER_PROMPTS = "imagenet_select_clip"
GOLDEN = Path(__file__).parents[1] / "golden" / "small"


class GoldenCase:
    """One directory; its files are read when they are asked for.

    Attributes:
        directory: the files.
        sizes: of the model, `case.json`'s.
        seen: and `unseen`, the class names.
    """

    def __init__(self, directory: str | Path):
        """Reads `case.json`."""
        self.directory = Path(directory)
        path = self.directory / "case.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file: name a directory like golden/small")
        case = json.loads(path.read_text())["case"]
        self.sizes = case["model"]
        self.seen, self.unseen = tuple(case["seen"]), tuple(case["unseen"])
        self.names = self.seen + self.unseen
        self.output_sizes = case.get("output_sizes")
        self.prompts = case.get("prompt", "imagenet_select")
        self._arrays, self._text = {}, {}

    def has(self, file: str) -> bool:
        """Returns True if the directory has a file."""
        return (self.directory / file).is_file()

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of `name`.npz."""
        if name not in self._arrays:
            with np.load(self.directory / f"{name}.npz") as file:
                self._arrays[name] = {key: file[key] for key in file.files}
        return self._arrays[name]

    @property
    def is_seen(self) -> np.ndarray:
        """Bool [C]: seen classes come first."""
        return np.arange(len(self.names)) < len(self.seen)

    @functools.cached_property
    def clip(self) -> tuple[CLIP, dict]:
        """The CLIP and its parameters."""
        config, params = from_openai_state_dict(self.arrays("clip_weights"))
        return CLIP(config), params

    def text(self, names: tuple[str, ...], prompts: str) -> np.ndarray:
        """Text embeddings [C, D] as we compute them."""
        if (names, prompts) not in self._text:
            module, params = self.clip
            encode = jax.jit(lambda x: module.apply({"params": params}, x, method=CLIP.encode_text))
            tokens = tokenize_classes(Tokenizer.openai(), names, load_templates(prompts))
            self._text[names, prompts] = embed_tokens(encode, tokens)
        return self._text[names, prompts]

    def model(self, weights: str) -> tuple[models.Grouper | models.PerPixel, dict, dict]:
        """The module, its variables and sizes, from `weights`.npz; dropout is off."""
        heads = self.sizes["heads"]
        checkpoint = from_checkpoint(self.arrays(weights), weights, heads=heads)
        kind = "per_pixel" if weights.startswith("per_pixel") else "zegformer"
        embed_dim = self.clip[0].config.embed_dim
        module = models.build(kind, without_dropout(checkpoint.sizes), embed_dim)
        return module, checkpoint.variables, checkpoint.sizes

    def training_batch(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images uint8 [B, H, W, 3], their sizes [B, 2] and labels [B, H, W], padded together."""
        arrays = self.arrays("training")
        count = sum(name.startswith("image") for name in arrays)
        images = [arrays[f"image{i}"].transpose(1, 2, 0) for i in range(count)]
        sizes = np.array([image.shape[:2] for image in images])
        height, width = -(-sizes.max(axis=0) // 32) * 32
        batch = np.zeros((count, height, width, 3), np.uint8)
        labels = np.full((count, height, width), np.iinfo(arrays["label0"].dtype).max)
        for i, (h, w) in enumerate(sizes):
            batch[i, :h, :w] = images[i]
            labels[i, :h, :w] = arrays[f"label{i}"]
        return batch, sizes, labels


def without_dropout(sizes: dict) -> dict:
    """The same sizes with every dropout rate 0, as the golden numbers were computed."""
    return {
        name: part | {"dropout": 0.0} if isinstance(part, dict) and "dropout" in part else part
        for name, part in sizes.items()
    }
