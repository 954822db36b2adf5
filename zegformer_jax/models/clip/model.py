"""CLIP (Radford et al. 2021, arXiv 2103.00020) in Flax: its sizes, and both towers together.

Axes: b image or text, t token, d joint embedding; in images h and w are pixels.
"""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
from flax import linen as nn

from zegformer_jax.models.clip.resnet import STRIDE, WIDTH_FACTOR, ModifiedResNet
from zegformer_jax.models.clip.text import TextTransformer
from zegformer_jax.models.clip.vit import ACTIVATIONS, VisionTransformer
from zegformer_jax.models.normalise import unit_length
from zegformer_jax.runtime.errors import UserError

CLIP_MEAN = (122.7709383, 116.7460125, 104.09373615)  # of RGB 0..255, openai/CLIP clip.py
CLIP_STD = (68.5005327, 66.6321579, 70.3231630)
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)  # section 2.5
STAGES = 4  # of a ModifiedResNet
MOST_LAYERS, MOST_SIZE = 200, 2**24  # far beyond any CLIP
SIZES = (
    "image_size", "vision_width", "vision_heads", "text_width", "text_heads", "vocab_size",
    "context_length", "embed_dim",
)  # fmt: skip
OPTIONAL = ("patch_size", "vision_mlp_width", "eos_token_id")


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of a CLIP; the defaults are those of ViT-B/16.

    The image tower is a ViT, or a ModifiedResNet where `vision_layers` is a tuple, the number
    of bottlenecks of each stage; then `vision_width` is that of the first stage,
    `vision_heads` are the attention pool's, and `patch_size` is None.
    `vision_mlp_width` None is four times the width of the ViT.
    `eos_token_id` is the token at which the text's feature is read, at its first occurrence;
    None is OpenAI's rule, the position of the largest token id.
    Raises UserError where a width is not a multiple of its heads, the image not of its patches
    (of 32 for a ResNet), a field does not belong to the tower, the activation is unknown, or a size
    is no whole number from 1 on.
    """

    image_size: int = 224
    patch_size: int | None = 16
    vision_width: int = 768
    vision_layers: int | tuple[int, int, int, int] = 12
    vision_heads: int = 12
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    vocab_size: int = 49408
    context_length: int = 77
    embed_dim: int = 512
    activation: str = "quick_gelu"
    eos_token_id: int | None = None
    vision_mlp_width: int | None = None

    def __post_init__(self):
        """Checks the sizes, also against each other."""
        self._check_numbers()
        if self.is_resnet:
            self._check_resnet()
        elif self.patch_size is None:
            raise UserError("ClipConfig: a ViT has a patch_size, not None")
        else:
            self._check_multiple("image_size", "patch_size")
            self._check_multiple("vision_width", "vision_heads")
        self._check_multiple("text_width", "text_heads")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"ClipConfig: activation '{self.activation}' is not one of {known}")

    @property
    def is_resnet(self) -> bool:
        """True if the image tower is a ModifiedResNet."""
        return not isinstance(self.vision_layers, int)

    @property
    def grid_size(self) -> int:
        """Side of the image tower's last grid, in patches or places."""
        return self.image_size // (self.patch_size or STRIDE)

    def _check_numbers(self) -> None:
        layers = self.vision_layers if self.is_resnet else (self.vision_layers,)
        if self.is_resnet and (not isinstance(layers, tuple) or len(layers) != STAGES):
            raise UserError(f"ClipConfig: a ResNet's vision_layers are four numbers, not {layers}")
        counts = {"vision_layers": layers, "text_layers": (self.text_layers,)}
        sizes = {name: (getattr(self, name),) for name in SIZES}
        for name in OPTIONAL:
            if getattr(self, name) is not None:
                sizes[name] = (getattr(self, name),)
        for most, fields in ((MOST_LAYERS, counts), (MOST_SIZE, sizes)):
            for name, values in fields.items():
                if not all(isinstance(x, numbers.Integral) and 1 <= x <= most for x in values):
                    raise UserError(f"ClipConfig: {name} is {values[0]!r}, not in 1..{most}")

    def _check_multiple(self, whole: str, part: str) -> None:
        if getattr(self, whole) % getattr(self, part):
            raise UserError(
                f"ClipConfig: {whole} {getattr(self, whole)} is not a multiple of "
                f"{part} {getattr(self, part)}"
            )

    def _check_resnet(self) -> None:
        for field in ("patch_size", "vision_mlp_width"):
            if getattr(self, field) is not None:
                raise UserError(f"ClipConfig: a ResNet has no {field}: give None")
        if self.image_size % STRIDE:
            raise UserError(
                f"ClipConfig: image_size {self.image_size} is not a multiple of {STRIDE}, "
                "a ResNet's stride"
            )
        if self.vision_width * WIDTH_FACTOR % self.vision_heads or self.vision_width % 2:
            raise UserError(
                f"ClipConfig: vision_width {self.vision_width} is not even, or {WIDTH_FACTOR} "
                f"times it not a multiple of vision_heads {self.vision_heads}"
            )


class CLIP(nn.Module):
    """Both towers and the logarithm of the logit scale; parameters are float32.

    `dtype` is the compute dtype; softmaxes, norm statistics and features are float32.
    """

    config: ClipConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Builds the towers `visual` and `text` and the scalar `logit_scale`."""
        config = self.config
        tower = {
            "image_size": config.image_size,
            "width": config.vision_width,
            "layers": config.vision_layers,
            "heads": config.vision_heads,
            "embed_dim": config.embed_dim,
            "dtype": self.dtype,
        }
        if config.is_resnet:
            self.visual = ModifiedResNet(**tower)
        else:
            self.visual = VisionTransformer(
                **tower,
                patch_size=config.patch_size,
                activation=config.activation,
                mlp_width=config.vision_mlp_width,
            )
        self.text = TextTransformer(
            vocab_size=config.vocab_size,
            context_length=config.context_length,
            width=config.text_width,
            layers=config.text_layers,
            heads=config.text_heads,
            embed_dim=config.embed_dim,
            eos_token_id=config.eos_token_id,
            activation=config.activation,
            dtype=self.dtype,
        )
        self.logit_scale = self.param(
            "logit_scale", nn.initializers.constant(INITIAL_LOGIT_SCALE), ()
        )

    def encode_image(self, images_bhwc: jax.Array) -> jax.Array:
        """Encodes images [B, S, S, 3], normalised by CLIP's mean and std, as float32 [B, D].

        The features are not L2-normalised. Raises ValueError where S is not the image size.
        """
        return self.visual(images_bhwc)

    def encode_segments(
        self, images_bhwc: jax.Array, coverage_bqp: jax.Array, segment_layers: int
    ) -> jax.Array:
        """Encodes segments of images as float32 [B, Q, D], in one pass over each image.

        Not as the published system does: another accuracy for a fraction of the work. See
        `VisionTransformer.encode_segments`. Raises UserError where the image tower is no ViT.
        """
        if self.config.is_resnet:
            raise UserError("segments in one pass (eval.segment_classifier) need a CLIP with a ViT")
        return self.visual.encode_segments(images_bhwc, coverage_bqp, segment_layers)

    def encode_text(self, tokens_bt: jax.Array) -> jax.Array:
        """Encodes token ids int32 [B, T] as float32 features [B, D], not L2-normalised."""
        return self.text(tokens_bt)

    def __call__(
        self, images_bhwc: jax.Array, tokens_bt: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """L2-normalised image and text features, [B, D] each, and exp(logit scale)."""
        return (
            unit_length(self.encode_image(images_bhwc)),
            unit_length(self.encode_text(tokens_bt)),
            jnp.exp(self.logit_scale),
        )
