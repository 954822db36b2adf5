"""The method: groups pixels into segments, classifies the segments with CLIP."""

from typing import Any, NamedTuple

import jax

from zegformer_jax.models.clip.model import CLIP, CLIP_MEAN, CLIP_STD
from zegformer_jax.models.grouper import Grouper
from zegformer_jax.models.normalise import normalise_images
from zegformer_jax.segmentation.augmentation import Version
from zegformer_jax.segmentation.class_scores import clip_logits
from zegformer_jax.segmentation.classifiers.crops import STYLES, segment_features
from zegformer_jax.segmentation.classifiers.one_pass import (
    ONE_PASS,
    encode_in_one_pass,
)
from zegformer_jax.segmentation.skipping import Economy

CHUNK = 25  # segments that CLIP encodes at once
CHUNKS = {"cpu": 4}  # its caches hold what so few need: less than half of the time
SEGMENT_STYLES = (*STYLES, ONE_PASS)


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


class TextEmbeddings(NamedTuple):
    """A vocabulary as the two halves of the method see it, float32 [C, D] each.

    The second is None in the baseline, which has one half.
    """

    grouper_cd: jax.Array
    classifier_cd: jax.Array | None


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
    clip_logits_qc = clip_logits(features_qd, text.classifier_cd, scale)
    return Queries(class_logits_qc, mask_logits_qhw, clip_logits_qc, named_q)
