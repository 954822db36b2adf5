"""ADE20K-Full: the 847 classes of the full ADE20K (version 2021_17_01)."""

import dataclasses
import io
import os
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from zegformer_jax.input import decoding
from zegformer_jax.input.benchmarks import files
from zegformer_jax.input.benchmarks.benchmark import Example
from zegformer_jax.input.benchmarks.published import TRAIN, VALIDATION, Published
from zegformer_jax.runtime.errors import UserError

FOLDERS = {TRAIN: "training", VALIDATION: "validation"}
ARCHIVE = files.Archive(
    "ADE20K_2021_17_01.zip",
    "https://ade20k.csail.mit.edu (sent after registration)",
    (
        "ADE20K_2021_17_01/images/ADE/{training,validation}/*/*/*.jpg",
        "ADE20K_2021_17_01/images/ADE/{training,validation}/*/*/*_seg.png",
    ),
)
NUM_IDS = 3688  # objects of version 2021_17_01; ids count from 1, 0 is unlabelled
MAX_SHORT_SIDE = 512  # pixels; larger images are shrunk


@dataclasses.dataclass(frozen=True, eq=False)
class Ade20kFull(Published):
    """ADE20K 2021_17_01: id R // 10 * 256 + G of `_seg.png`; ids without a class are ignored."""

    def _list(self, source: Path, split: str) -> list[Example]:
        folder = FOLDERS[split]
        parents = ("ADE20K_2021_17_01/images/ADE", "images/ADE", "ADE")
        root = files.find(source, [f"{parent}/{folder}" for parent in parents], ARCHIVE)
        images = _find_images(root)
        if not images:
            raise files.missing(root / "*/*/*.jpg", ARCHIVE)
        return [Example(path.stem, path, path.with_name(f"{path.stem}_seg.png")) for path in images]

    def read(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """Reads a record, shrunk if its shorter side exceeds 512; see `Benchmark.read`."""
        image_hw3, label_hw = super().read(example)
        size = _resized(image_hw3.shape[1], image_hw3.shape[0])
        if size is None:
            return image_hw3, label_hw
        image = Image.fromarray(image_hw3).resize(size, Image.Resampling.BILINEAR)
        label = Image.fromarray(label_hw.astype(np.int32)).resize(size, Image.Resampling.NEAREST)
        return np.asarray(image), np.asarray(label).astype(np.uint16)

    def encoded_image(self, example: Example) -> bytes | None:
        """Returns the file's bytes; None also if `read` resizes; see `Benchmark.encoded_image`."""
        data = super().encoded_image(example)
        if data is None:
            return None
        with Image.open(example.image) as image:
            return data if _resized(*image.size) is None else None

    def _read_ids(self, path: Path) -> np.ndarray:
        data = decoding.read_file(path)
        pixels_hw3 = decoding.decode_image(data, path).astype(np.int32)
        with Image.open(io.BytesIO(data)) as image:
            if (image.format, image.mode) != ("PNG", "RGB"):
                kind = f"{image.format} of mode {image.mode}"
                raise UserError(f"{path}: a {kind}; ADE20K's ids are in an RGB PNG's red and green")
        return pixels_hw3[..., 0] // 10 * 256 + pixels_hw3[..., 1]

    @cached_property
    def _table(self) -> np.ndarray:
        vocabulary = self.load_vocabulary()
        ignored = range(NUM_IDS + 1)
        return files.label_table(vocabulary.ids, ignored, vocabulary.ignore_label)


def _find_images(root: Path) -> list[Path]:
    """Finds the images below the folders of scenes, not those in each image's folder of parts."""
    images = []
    for folder, children, names in os.walk(root):
        found = {name[:-4] for name in names if name.endswith(".jpg")}
        images += [Path(folder, f"{stem}.jpg") for stem in found]
        children[:] = [child for child in children if child not in found]
    return images


def _resized(width: int, height: int) -> tuple[int, int] | None:
    """Returns the width and height to which an image is shrunk; None if it is kept."""
    short = min(width, height)
    if short <= MAX_SHORT_SIDE:
        return None
    return tuple(int(side * MAX_SHORT_SIDE / short + 0.5) for side in (width, height))


BENCHMARK = Ade20kFull(
    name="ade20k_full",
    vocabulary="ade20k_full_847",
    counts={TRAIN: 25574, VALIDATION: 2000},
    archives=(ARCHIVE,),
    advice=(
        "Images whose shorter side exceeds 512 pixels are shrunk. Labels have 16 bits; "
        "objects outside the 847 are ignored (65535)."
    ),
)
