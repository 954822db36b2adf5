"""Segments named in one pass: a segment's token sees what it shall see, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clips import RESNET, VIT, random_params
from slow_but import slow_but

from zegformer_jax.models.clip.model import CLIP
from zegformer_jax.models.clip.vit import TransformerBlock
from zegformer_jax.models.layers import layer_norm

CONFIG = dataclasses.replace(VIT, vision_layers=3)  # 9 patches
PARAMS = random_params(CONFIG)
IMAGES = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)


def encode(coverage, layers, images=IMAGES):
    return CLIP(CONFIG).apply(
        {"params": PARAMS}, images, jnp.asarray(coverage), layers, method=CLIP.encode_segments
    )


def whole(images=IMAGES):
    return CLIP(CONFIG).apply({"params": PARAMS}, images, method=CLIP.encode_image)


@pytest.mark.parametrize("layers", slow_but([1], [1, 2, 3]))
def test_a_segment_of_everything_is_the_picture(layers):
    """Its token attends to itself and to all patches: as the class token does."""
    coverage = np.stack([np.ones((2, 9)), np.full((2, 9), 0.25)], 1).astype(np.float32)
    features = encode(coverage, layers)
    for query in range(2):
        np.testing.assert_allclose(features[:, query], whole(), rtol=1e-4, atol=1e-5)


def last_block(tokens_tw):
    """The last block, layer norm and projection of the first of some tokens."""
    tower = PARAMS["visual"]
    block = TransformerBlock(CONFIG.vision_heads, CONFIG.vision_layers, CONFIG.activation)
    out = block.apply({"params": tower["block_2"]}, tokens_tw[None])[0, 0]
    out = layer_norm("ln_post", jnp.float32).apply({"params": tower["ln_post"]}, out)
    return out @ tower["projection"]


def tokens_before_the_last_block():
    _, state = CLIP(CONFIG).apply(
        {"params": PARAMS}, IMAGES[:1], method=CLIP.encode_image, capture_intermediates=True
    )
    return state["intermediates"]["visual"]["block_1"]["__call__"][0][0]


@pytest.mark.slow
def test_a_segment_sees_its_own_patches_in_proportion():
    """Weights 2 to 1 are the same patch there twice and once; the token itself weighs 2."""
    tokens = tokens_before_the_last_block()
    coverage = np.zeros((1, 2, 9), np.float32)
    coverage[0, 0, [4, 7]] = 1.0
    coverage[0, 1, [1, 5]] = 0.5, 0.25
    features = encode(coverage, 1, IMAGES[:1])[0]
    np.testing.assert_allclose(features[0], last_block(tokens[jnp.array([0, 5, 8])]), atol=1e-5)
    twice = tokens[jnp.array([0, 0, 2, 2, 6])]
    np.testing.assert_allclose(features[1], last_block(twice), atol=1e-5)
    assert np.abs(features[0] - features[1]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 3])
def test_segments_do_not_see_each_other(layers):
    rng = np.random.default_rng(1)
    coverage = np.where(rng.random((2, 4, 9)) < 0.5, rng.random((2, 4, 9)), 0).astype(np.float32)
    coverage[:, 3] = 0  # an empty one
    together = encode(coverage, layers)
    alone = [encode(coverage[:, i : i + 1], layers)[:, 0] for i in range(4)]
    np.testing.assert_allclose(together, np.stack(alone, 1), rtol=1e-4, atol=1e-5)
    assert np.isfinite(together).all()


@pytest.mark.parametrize("layers", [0, 4])
def test_there_are_only_so_many_layers(layers):
    with pytest.raises(ValueError, match=r"eval.one_pass_layers\): choose 1 to 3"):
        encode(np.ones((2, 1, 9), np.float32), layers)


def test_a_resnet_has_no_class_token():
    module = CLIP(RESNET)
    images, coverage = np.zeros((1, 96, 96, 3), np.float32), np.ones((1, 1, 9), np.float32)
    with pytest.raises(ValueError, match="need a CLIP with a ViT"):
        jax.eval_shape(
            lambda: module.apply(
                {"params": random_params(RESNET)}, images, coverage, 1, method=CLIP.encode_segments
            )
        )
