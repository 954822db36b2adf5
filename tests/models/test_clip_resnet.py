"""CLIP's ModifiedResNet: its attention pool in NumPy, the whole of it in plain PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clips import CLIPS, RESNET, random_params

from zegformer_jax.models.clip.model import CLIP
from zegformer_jax.models.clip.resnet import NORM, AttentionPool
from zegformer_jax.models.layers import ConvNorm
from zegformer_jax.pretrained.clip.tensors import OPENAI, published_tensors

TOLERANCE = 1e-5  # of the largest feature; float32 on both sides


def encode(config, params, images, dtype=jnp.float32):
    """The image tower's features, as NumPy."""
    apply = jax.jit(lambda p, x: CLIP(config, dtype).apply({"params": p}, x, method="encode_image"))
    return np.asarray(apply(params, images))


def random_images(config, count=2):
    rng = np.random.default_rng(3)
    return rng.normal(size=(count, config.image_size, config.image_size, 3)).astype(np.float32)


def test_attention_pool_is_full_attention_read_at_the_mean_token():
    """Against attention from every token to every token, in float64."""
    heads, channels, depth = 3, 12, 5
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 2, 3, channels)).astype(np.float32)
    pool = AttentionPool(heads, depth)
    shapes = jax.eval_shape(pool.init, jax.random.key(0), features)["params"]
    params = jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), shapes)

    for image, pooled in zip(features, pool.apply({"params": params}, features), strict=True):
        places = image.reshape(-1, channels).astype(np.float64)
        tokens = np.concatenate([places.mean(0, keepdims=True), places])
        tokens += params["position_embedding"]
        query, key, value = (
            tokens @ params[name]["kernel"].reshape(channels, -1) + params[name]["bias"].ravel()
            for name in ("query", "key", "value")
        )
        attended = np.zeros_like(tokens)
        for head in range(heads):
            part = slice(4 * head, 4 * head + 4)
            weights = np.exp(query[:, part] @ key[:, part].T / 2)  # 2: root of a head's width 4
            weights /= weights.sum(1, keepdims=True)
            attended[:, part] = weights @ value[:, part]
        out = attended @ params["out"]["kernel"].reshape(-1, depth) + params["out"]["bias"]
        np.testing.assert_allclose(pooled, out[0], rtol=1e-5, atol=1e-5)


def test_a_frozen_norm_takes_no_gradient_into_its_statistics():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 4, 4, 3)).astype(np.float32)
    layer = ConvNorm(5, 1, norm=NORM)
    params = layer.init(jax.random.key(0), x)["params"]
    norm = {name: rng.uniform(0.5, 2, 5).astype(np.float32) for name in params["norm"]}
    params = {"conv": params["conv"], "norm": norm}

    y = layer.apply({"params": params}, x)
    plain = x @ np.asarray(params["conv"]["kernel"][0, 0])
    scale = norm["scale"] / np.sqrt(norm["var"] + 1e-5)
    np.testing.assert_allclose(y, (plain - norm["mean"]) * scale + norm["bias"], rtol=1e-4)
    gradient = jax.grad(lambda p: layer.apply({"params": p}, x).sum())(params)["norm"]
    assert np.all(gradient["mean"] == 0) and np.all(gradient["var"] == 0)
    assert np.all(gradient["scale"] != 0) and np.all(gradient["bias"] != 0)


def test_bfloat16_is_close_and_gives_float32():
    params, images = random_params(RESNET, std=None), random_images(RESNET)
    exact, coarse = (encode(RESNET, params, images, x) for x in (jnp.float32, jnp.bfloat16))
    assert coarse.dtype == np.float32
    assert np.any(coarse != exact)
    np.testing.assert_allclose(coarse, exact, atol=0.03 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 100}, "image_size 100 is not a multiple of 32, a ResNet's stride"),
        ({"patch_size": 16}, "a ResNet has no patch_size: give None"),
        ({"vision_mlp_width": 24}, "a ResNet has no vision_mlp_width: give None"),
        ({"vision_heads": 7}, "32 times it not a multiple of vision_heads 7"),
        ({"vision_layers": 12}, "a ViT has a patch_size, not None"),
    ],
)
def test_config_checks(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RESNET, **fields)


def test_another_image_size_raises():
    params = random_params(RESNET)
    with pytest.raises(ValueError, match=r"takes \[B, 96, 96, 3\], got \[2, 64, 64, 3\]"):
        encode(RESNET, params, np.zeros((2, 64, 64, 3), np.float32))


@pytest.mark.parametrize(
    "config",
    [RESNET, pytest.param(CLIPS["RN50"], marks=pytest.mark.slow)],
    ids=["small", "RN50"],
)
def test_features_are_those_of_the_published_architecture(config):
    pytest.importorskip("torch")
    config = dataclasses.replace(config, vocab_size=530)  # the text tower does not matter here
    params, images = random_params(config, std=None), random_images(config)
    tensors = published_tensors(params, config, OPENAI)
    expected = torch_features(tensors, images.transpose(0, 3, 1, 2), config)
    assert np.abs(expected).max() > 0.1
    features = encode(config, params, images)
    np.testing.assert_allclose(features, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def torch_features(tensors, images, config):
    """CLIP's ModifiedResNet by functional operations, from tensors in OpenAI's naming.

    Its facts are those of openai/CLIP's model.py (MIT): three 3x3 convolutions and an average
    pool, bottlenecks whose stride is an average pool, attention from the mean token.
    """
    import torch
    import torch.nn.functional as F

    t = {name.removeprefix("visual."): torch.tensor(x) for name, x in tensors.items()}

    def conv_norm(x, conv, norm, stride=1):
        weight = t[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        statistics = t[f"{norm}.running_mean"], t[f"{norm}.running_var"]
        return F.batch_norm(x, *statistics, t[f"{norm}.weight"], t[f"{norm}.bias"], eps=1e-5)

    def bottleneck(x, name, stride):
        y = conv_norm(x, f"{name}.conv1", f"{name}.bn1").relu()
        y = conv_norm(y, f"{name}.conv2", f"{name}.bn2").relu()
        y = conv_norm(F.avg_pool2d(y, stride), f"{name}.conv3", f"{name}.bn3")
        if f"{name}.downsample.0.weight" in t:
            x = F.avg_pool2d(x, stride)
            x = conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1")
        return (x + y).relu()

    x = torch.tensor(images)
    for i in (1, 2, 3):
        x = conv_norm(x, f"conv{i}", f"bn{i}", stride=2 if i == 1 else 1).relu()
    x = F.avg_pool2d(x, 2)
    for stage, blocks in enumerate(config.vision_layers, start=1):
        for i in range(blocks):
            x = bottleneck(x, f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1)

    x = x.flatten(2).permute(2, 0, 1)
    x = torch.cat([x.mean(0, keepdim=True), x]) + t["attnpool.positional_embedding"][:, None]
    pooled, _ = F.multi_head_attention_forward(
        query=x[:1], key=x, value=x,
        embed_dim_to_check=x.shape[-1], num_heads=config.vision_heads,
        in_proj_weight=None, use_separate_proj_weight=True,
        q_proj_weight=t["attnpool.q_proj.weight"], k_proj_weight=t["attnpool.k_proj.weight"],
        v_proj_weight=t["attnpool.v_proj.weight"],
        in_proj_bias=torch.cat([t[f"attnpool.{x}_proj.bias"] for x in "qkv"]),
        bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0,
        out_proj_weight=t["attnpool.c_proj.weight"], out_proj_bias=t["attnpool.c_proj.bias"],
        training=False, need_weights=False,
    )  # fmt: skip
    return pooled[0].numpy()
