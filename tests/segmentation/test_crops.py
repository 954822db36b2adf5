"""Tests of the segments that CLIP encodes: their choice, number and features."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_but import slow_but

from zegformer_jax.models.clip.model import CLIP, ClipConfig
from zegformer_jax.segmentation.classifiers.crops import (
    STYLES,
    Crops,
    segment_features,
    segment_images,
)

SIDE = 32
TOWER = ClipConfig(
    image_size=SIDE, patch_size=8, vision_width=64, vision_layers=2, vision_heads=2,
    text_width=16, text_layers=1, text_heads=1, embed_dim=24,
)  # fmt: skip


@pytest.fixture(scope="module")
def picture():
    """A noisy picture, and mask logits of segments that differ."""
    rng = np.random.default_rng(0)
    image = rng.normal(1, 1, (64, 96, 3)).astype(np.float32)
    return image, rng.normal(0, 1, (9, 16, 24)).astype(np.float32)


@pytest.fixture(scope="module")
def encode():
    """CLIP's image tower, with matrices large enough for a library's products."""
    clip, crops = CLIP(TOWER), jnp.zeros((1, SIDE, SIDE, 3))
    params = jax.jit(partial(clip.init, method=CLIP.encode_image))(jax.random.key(0), crops)
    return lambda crops: clip.apply(params, crops, method=CLIP.encode_image)


def counted(encode, encoded):
    """Notes how many images each call encodes."""

    def call(images_nssc):
        jax.debug.callback(lambda: encoded.append(len(images_nssc)))
        return encode(images_nssc)

    return call


def features_of(encode, **settings):
    return jax.jit(partial(segment_features, encode, side=SIDE, **settings))


@pytest.mark.parametrize("style", slow_but(STYLES[:1], STYLES))
@pytest.mark.parametrize("chunk", slow_but([4], [1, 4, 99]))
def test_features_are_those_of_every_segments_image(picture, encode, style, chunk):
    image, logits = picture
    logits = np.concatenate([logits, -np.abs(logits[:2]), logits[3:5], 2 * logits[5:6]])
    encoded = []
    features = features_of(counted(encode, encoded), style=style, chunk=chunk)(image, logits)
    jax.effects_barrier()
    look = jax.jit(partial(segment_images, style=style, side=SIDE))
    np.testing.assert_allclose(features, encode(look(image, logits)), rtol=1e-4, atol=1e-5)
    assert set(encoded) == {min(chunk, len(logits))}


@pytest.mark.parametrize("style", slow_but(STYLES[:1], STYLES))
def test_no_bit_depends_on_the_other_segments(picture, encode, style):
    """Segments come in any order, beside empty, unwanted and equal ones, or alone in a chunk."""
    image, logits = picture
    run = features_of(encode, style=style, chunk=4)
    features = np.asarray(run(image, logits))
    assert len(np.unique(features, axis=0)) == len(logits) or style == "crop"
    order = np.random.default_rng(1).permutation(len(logits))
    np.testing.assert_array_equal(run(image, logits[order]), features[order])
    for kept in (slice(0, 1), slice(2, 5), slice(4, 9)):
        some = np.full_like(logits, -1.0)
        some[kept] = logits[kept]
        np.testing.assert_array_equal(run(image, some)[kept], features[kept])
        wanted = np.zeros(len(logits), bool)
        wanted[kept] = True
        np.testing.assert_array_equal(run(image, logits, wanted_q=wanted)[kept], features[kept])
    like = logits[np.array([0, 1, 0, 0, 2, 1, 3, 0, 2])]
    np.testing.assert_array_equal(run(image, like), features[np.array([0, 1, 0, 0, 2, 1, 3, 0, 2])])


def test_unwanted_segments_look_empty(picture, encode):
    image, logits = picture
    run = features_of(encode, chunk=2)
    empty = np.asarray(run(image, np.full_like(logits, -1.0))[0])
    some = np.asarray(run(image, logits, wanted_q=np.arange(len(logits)) % 3 > 0))
    np.testing.assert_array_equal(some[::3], np.stack([empty] * 3))
    assert not (some[1::3] == empty).any()


@pytest.mark.parametrize("chunk", [1, 3, 4, 99])
def test_all_empty_segments_are_encoded_as_one(picture, chunk):
    """The chunks hold all shown segments, and one for those that are not shown."""
    image, logits = picture
    encoded = []
    encode = counted(partial(jnp.mean, axis=(1, 2)), encoded)
    run = features_of(encode, chunk=chunk)
    look = jax.jit(partial(segment_images, side=SIDE))
    rng, size = np.random.default_rng(chunk), min(chunk, 9)
    for empty, unwanted in [(0, 0), (3, 0), (1, 2), (0, 9), (8, 0), (9, 0)]:
        there, wanted = rng.permutation(9) >= empty, rng.permutation(9) >= unwanted
        shown = np.where(there[:, None, None], logits, -1.0)
        features = run(image, shown, wanted_q=wanted)
        jax.effects_barrier()
        needed = (there & wanted).sum() + (not (there & wanted).all())
        assert encoded == [size] * -(-needed // size)
        encoded.clear()
        shown[~wanted] = -1.0
        np.testing.assert_allclose(features, look(image, shown).mean((1, 2)), atol=1e-6)


def test_a_segment_is_empty_where_no_logit_is_positive(picture):
    """A single positive logit is a segment; logits of exactly 0 are none."""
    image, _ = picture
    logits = np.full((4, 16, 24), -1.0, np.float32)
    logits[1], logits[2, 3, 5], logits[3] = 0.0, 9.0, 9.0
    encoded = []
    run = features_of(counted(partial(jnp.mean, axis=(1, 2)), encoded), chunk=1)
    features = np.asarray(run(image, logits))
    jax.effects_barrier()
    assert encoded == [1, 1, 1]  # an empty one for the first two, and one each of the others
    np.testing.assert_array_equal(features[0], features[1])
    assert np.any(features[2] != features[0]) and np.any(features[3] != features[2])


@pytest.mark.parametrize("style", STYLES)
def test_no_query_has_a_map_of_the_pictures_size(style):
    """None has a map of CLIP's image size either: memory grows with the chunk, not the queries."""

    def temporaries(queries, chunk):
        image, logits = np.zeros((256, 256, 3), np.float32), np.zeros((queries, 16, 16), np.float32)
        run = features_of(partial(jnp.mean, axis=(1, 2)), style=style, chunk=chunk)
        return run.lower(image, logits).compile().memory_analysis().temp_size_in_bytes

    few, many = temporaries(20, 2), temporaries(60, 2)
    assert many - few < 40 * SIDE * SIDE
    assert temporaries(20, 4) - few > 2 * 256 * 256 or style == "mask"


def test_wrong_fields_are_named():
    with pytest.raises(ValueError, match="crop_style 'blur': choose one of cropmask, crop, mask"):
        Crops(CLIP(TOWER), "blur")
    with pytest.raises(ValueError, match="eval.clip_chunk -1: give a number of segments, or 0"):
        Crops(CLIP(TOWER), clip_chunk=-1)
