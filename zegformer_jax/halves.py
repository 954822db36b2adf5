"""Both halves of the method on a picture: the grouper's queries, and CLIP's names for segments."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from zegformer_jax import experiment, inference, label_maps
from zegformer_jax.models.clip import CLIP, CLIP_MEAN, CLIP_STD
from zegformer_jax.models.grouper import Grouper
from zegformer_jax.models.normalise import normalise_images
from zegformer_jax.segment_encoding import segment_features
from zegformer_jax.segments import STYLES, whole_picture

CHUNK = 25  # segments that CLIP encodes at once
CHUNKS = {"cpu": 4}  # its caches hold what so few need: less than half of the time
ONE_PASS = "one_pass"  # a way to show segments to CLIP, without crops
SEGMENT_STYLES = (*STYLES, ONE_PASS)


class Version(NamedTuple):
    """One version of a picture that the models see.

    Attributes:
        image_hwc: RGB 0..255 [H, W, 3], padded at the bottom and right to multiples of 32.
        size: int [2], height and width before padding.
        mirrored: whether the columns are from right to left.
    """

    image_hwc: jax.Array
    size: jax.Array
    mirrored: bool = False


def make_versions(picture: Mapping[str, jax.Array], mirrored_too: bool) -> list[Version]:
    """The versions of a picture that test-time augmentation averages; the first is the plain one.

    Args:
        picture: `image` and `size`, `image_1` and `size_1`, ..., a row of what
            `input.pipeline.eval_batches` gives.
        mirrored_too: whether each is also seen mirrored.
    """
    names = sorted(name for name in picture if name.startswith("image"))
    plain = [Version(picture[name], picture[name.replace("image", "size")]) for name in names]
    if not mirrored_too:
        return plain
    return plain + [Version(label_maps.mirror(x.image_hwc, x.size), x.size, True) for x in plain]


class Queries(NamedTuple):
    """What both halves of the method say of every query of a picture.

    Attributes:
        class_logits_qc: the grouper's, float32 [Q, C + 1], "no object" last.
        mask_logits_qhw: float32 [Q, H/4, W/4].
        clip_logits_qc: the segment classifier's, float32 [Q, C].
        named_q: bool [Q], whether CLIP's logits count.
    """

    class_logits_qc: jax.Array
    mask_logits_qhw: jax.Array
    clip_logits_qc: jax.Array
    named_q: jax.Array


class Economy(NamedTuple):
    """Which segments CLIP need not see.

    Attributes:
        skip_below: those whose weight in every pixel of the map is provably below this share one
            encoding with the empty ones; 0 changes nothing.
        top_segments: only so many, with the most foreground, are named by CLIP, the others by the
            grouper; 0: all.
        modes: the ways of scoring that the bound is for.
        weight: of the ensemble.
        vocabularies: those that are scored: places among the classes, and which of them are seen.
    """

    skip_below: float
    top_segments: int
    modes: tuple[str, ...]
    weight: float
    vocabularies: tuple[tuple[Sequence[int], jax.Array], ...]

    def choose(self, class_logits_qc: jax.Array, mask_logits_qhw: jax.Array, scale: jax.Array):
        """Tells which queries CLIP shall see, and which it names: bool [q] each."""
        named_q = jnp.ones(len(class_logits_qc), bool)
        if self.top_segments:
            weights_q = inference.foreground_weights(class_logits_qc, mask_logits_qhw)
            ranks_q = jnp.argsort(jnp.argsort(-weights_q))
            named_q = ranks_q < self.top_segments
        if not self.skip_below:
            return named_q, named_q
        bounds = [
            inference.score_bounds(
                inference.select_classes(class_logits_qc, indices),
                seen_c, scale, mode=mode, weight=self.weight,
            )
            for indices, seen_c in self.vocabularies
            for mode in self.modes
        ]  # fmt: skip
        opacity_q = jax.nn.sigmoid(mask_logits_qhw.astype(jnp.float32)).max((1, 2))
        needed_q = jnp.stack(bounds).max(0) * opacity_q >= self.skip_below
        return named_q & needed_q, named_q


class TextEmbeddings(NamedTuple):
    """A vocabulary as the two halves of the method see it, float32 [C, D] each.

    The second is None in the baseline, which has one half.
    """

    grouper_cd: jax.Array
    classifier_cd: jax.Array | None


def embed_vocabulary(
    config: ConfigDict,
    workdir: epath.Path,
    clip: experiment.LoadedClip | None,
    names: tuple[str, ...],
) -> TextEmbeddings:
    """Embeds class names for both halves of the method."""
    grouper_cd = jnp.asarray(
        experiment.embed_classes(config, workdir, clip, names, config.eval.grouper_prompts)
    )
    if config.model.kind == "per_pixel":
        return TextEmbeddings(grouper_cd, None)
    prompts = config.clip.classifier_prompts
    return TextEmbeddings(grouper_cd, jnp.asarray(experiment.embed_names(clip, names, prompts)))


def run_models(
    grouper: Grouper,
    clip: CLIP,
    variables: Any,
    clip_params: Any,
    text: TextEmbeddings,
    version: Version,
    *,
    crop_style: str,
    clip_chunk: int,
    one_pass_layers: int,
    economy: Economy,
) -> Queries:
    """Groups the pixels of a picture and lets CLIP name every segment.

    One picture at a time, so that the bits of what comes out depend on no other.

    Args:
        grouper: and `clip`, the modules.
        clip: see there.
        variables: the grouper's.
        clip_params: CLIP's.
        text: embeddings of the vocabulary.
        version: of the picture.
        crop_style: see `segments.segment_images`; or `ONE_PASS`.
        clip_chunk: segments that CLIP encodes at once; 0: as suits the device.
        one_pass_layers: of CLIP, in which segments are told apart in one pass.
        economy: which segments it encodes, in crops.

    Raises:
        ValueError: `crop_style` is unknown, `clip_chunk` negative, or one pass does not fit CLIP.
    """
    if crop_style not in SEGMENT_STYLES:
        known = ", ".join(SEGMENT_STYLES)
        raise ValueError(f"eval.crop_style '{crop_style}': choose one of {known}")
    if clip_chunk < 0:
        raise ValueError(f"eval.clip_chunk {clip_chunk}: give a number of segments, or 0")
    image_1hwc, size_12 = version.image_hwc[None], version.size[None]
    output = grouper.apply(
        variables, normalise_images(image_1hwc, size_12), text.grouper_cd, all_layers=False
    )
    class_logits_qc = output.class_logits_lbqc[0, 0]
    mask_logits_qhw = output.mask_logits_lbqhw[0, 0]
    image_hwc = normalise_images(image_1hwc, size_12, CLIP_MEAN, CLIP_STD)[0]
    scale = clip_params["logit_scale"]
    wanted_q, named_q = economy.choose(class_logits_qc, mask_logits_qhw, scale)
    if crop_style == ONE_PASS:
        features_qd = encode_in_one_pass(
            clip, clip_params, image_hwc, version.size, mask_logits_qhw, one_pass_layers
        )
    else:
        features_qd = segment_features(
            lambda crops: clip.apply({"params": clip_params}, crops, method=CLIP.encode_image),
            image_hwc,
            mask_logits_qhw,
            style=crop_style,
            side=clip.config.image_size,
            chunk=clip_chunk or CHUNKS.get(jax.default_backend(), CHUNK),
            wanted_q=wanted_q,
        )
    clip_logits_qc = inference.clip_logits(features_qd, text.classifier_cd, scale)
    return Queries(class_logits_qc, mask_logits_qhw, clip_logits_qc, named_q)


def encode_in_one_pass(
    clip: CLIP,
    clip_params: Any,
    image_hwc: jax.Array,
    size: jax.Array,
    mask_logits_qhw: jax.Array,
    layers: int,
) -> jax.Array:
    """CLIP's features of every segment from one look at the whole picture, [Q, D].

    The picture is squeezed into CLIP's square; see `VisionTransformer` for how segments are told
    apart there (Ding et al., "Open-Vocabulary Universal Image Segmentation with MaskCLIP", 2023).

    Args:
        clip: the module.
        clip_params: its parameters.
        image_hwc: normalised and then padded [H, W, 3].
        size: int [2], before padding.
        mask_logits_qhw: [Q, H/4, W/4].
        layers: of CLIP's image tower, the last ones, in which segments are told apart.
    """
    side, grid = clip.config.image_size, clip.config.grid_size
    square_ssc, coverage_qgg = whole_picture(image_hwc, mask_logits_qhw, size, side, grid)
    return clip.apply(
        {"params": clip_params},
        square_ssc[None],
        coverage_qgg.reshape(1, len(mask_logits_qhw), -1),
        layers,
        method=CLIP.encode_segments,
    )[0]


def make_economy(
    config: ConfigDict,
    methods: tuple[str, ...],
    vocabularies: Sequence[tuple[Sequence[int], Any]],
) -> Economy:
    """Reads from an experiment's config which segments CLIP need not see; see `Economy`.

    Raises:
        ValueError: a field is negative.
    """
    for name in ("skip_below", "top_segments"):
        if not config.eval[name] >= 0:
            raise ValueError(f"eval.{name} {config.eval[name]}: give 0 or more")
    return Economy(
        skip_below=config.eval.skip_below,
        top_segments=config.eval.top_segments,
        modes=methods,
        weight=config.eval.ensemble_weight,
        vocabularies=tuple((indices, jnp.asarray(seen_c)) for indices, seen_c in vocabularies),
    )
