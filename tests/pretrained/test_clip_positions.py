"""Interpolated positions against the kernel's definition, PyTorch and transformers."""

import dataclasses

import jax
import numpy as np
import pytest
from clips import RESNET, VIT, random_params

from configs import base
from zegformer_jax.experiment.models import load_clip_of
from zegformer_jax.models.clip.model import CLIP
from zegformer_jax.pretrained.clip.load import load_clip, save_clip
from zegformer_jax.pretrained.clip.positions import cubic_matrix, resize_positions
from zegformer_jax.text.tokenizer import train_tokenizer

SIZES = [(3, 3), (3, 5), (7, 12), (14, 24), (24, 14), (9, 4), (1, 3)]


def keys_sum(samples, place):
    """Interpolates by cubic convolution (Keys 1981) with a = -0.75, sample by sample."""
    total = 0.0
    for i in range(int(np.floor(place)) - 3, int(np.floor(place)) + 5):
        s = abs(place - i)
        weight = 0.0
        if s < 1:
            weight = 1.25 * s**3 - 2.25 * s**2 + 1
        elif s < 2:
            weight = -0.75 * s**3 + 3.75 * s**2 - 6 * s + 3
        total += weight * samples[min(max(i, 0), len(samples) - 1)]
    return total


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_matrix_is_cubic_convolution(old, new):
    samples = np.random.default_rng(0).normal(size=old)
    expected = [keys_sum(samples, (i + 0.5) * old / new - 0.5) for i in range(new)]
    np.testing.assert_allclose(cubic_matrix(old, new) @ samples, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_matrix_is_pytorchs(old, new):
    torch = pytest.importorskip("torch")
    grid = np.random.default_rng(0).normal(size=(2, 5, old, old))
    resized = torch.nn.functional.interpolate(
        torch.tensor(grid), size=(new, new), mode="bicubic", align_corners=False
    )
    matrix = cubic_matrix(old, new)
    np.testing.assert_allclose(matrix @ grid @ matrix.T, resized.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("config", "path", "size"),
    [(VIT, ("position_embedding",), 40), (RESNET, ("attention_pool", "position_embedding"), 160)],
    ids=["vit", "resnet"],
)
def test_only_the_positions_change_and_the_first_stays(config, path, size):
    params = random_params(config)
    resized_config, resized = resize_positions(params, config, size)
    assert resized_config == dataclasses.replace(config, image_size=size)
    old, new = params["visual"], resized["visual"]
    for key in path:
        old, new = old[key], new[key]
    side = resized_config.grid_size
    assert new.shape == (side**2 + 1, old.shape[1]) and new.dtype == np.float32
    np.testing.assert_array_equal(new[0], old[0])
    matrix = cubic_matrix(config.grid_size, side)
    for channel in range(old.shape[1]):
        grid = old[1:, channel].reshape(config.grid_size, config.grid_size)
        np.testing.assert_allclose(
            new[1:, channel].reshape(side, side), matrix @ grid @ matrix.T, rtol=1e-5, atol=1e-6
        )
    shared = [a is b for a, b in zip(*map(jax.tree.leaves, (params, resized)), strict=True)]
    assert shared.count(False) == 1

    features = jax.eval_shape(
        lambda x: CLIP(resized_config).apply({"params": resized}, x, method="encode_image"),
        np.zeros((1, size, size, 3), np.float32),
    )
    assert features.shape == (1, config.embed_dim)


def test_the_same_size_changes_nothing():
    params = random_params(VIT)
    config, same = resize_positions(params, VIT, 24)
    assert config == VIT
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True):
        assert one is other


def test_a_size_that_is_no_multiple_raises():
    with pytest.raises(ValueError, match="image_size 30 is not a multiple of patch_size 8"):
        resize_positions(random_params(VIT), VIT, 30)


def test_features_at_another_size_are_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import CLIPModel

    params = random_params(VIT)
    save_clip(tmp_path, VIT, params, train_tokenizer(["a"], 530, 14))
    images = np.random.default_rng(0).normal(size=(2, 40, 40, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = CLIPModel.from_pretrained(tmp_path).eval()
        vision = theirs.vision_model(
            torch.tensor(images.transpose(0, 3, 1, 2)), interpolate_pos_encoding=True
        )
        expected = theirs.visual_projection(vision.pooler_output).numpy()
    config, resized, _ = load_clip(tmp_path, image_size=40)
    features = CLIP(config).apply({"params": resized}, images, method="encode_image")
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("input_size, expected", [(0, VIT.image_size), (40, 40)])
def test_an_experiments_clip_sees_segments_in_its_input_size(tmp_path, input_size, expected):
    save_clip(tmp_path / "clip", VIT, random_params(VIT), train_tokenizer(["a"], 530, 14))
    config = base.get_config()
    config.clip.update(source="clip", input_size=input_size)
    loaded = load_clip_of(config, tmp_path)
    assert loaded.config.image_size == expected
    positions = loaded.params["visual"]["position_embedding"]
    assert len(positions) == (expected // VIT.patch_size) ** 2 + 1
