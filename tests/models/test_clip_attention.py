"""Attention of CLIP's towers: against its definition, and which kernel is asked for."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zegformer_jax.models.clip import attention
from zegformer_jax.runtime.target import compiling_for

QUERIES, KEYS, HEADS, CHANNELS = 3, 5, 2, 8


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = [(2, count, HEADS, CHANNELS) for count in (QUERIES, KEYS, KEYS)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def by_definition(query, key, value, bias):
    """Softmax of scaled products, in float64; `bias` is [B, Q, T]."""
    expected = np.zeros(query.shape)
    for b, q, h in np.ndindex(*query.shape[:3]):
        logits = key[b, :, h].astype(np.float64) @ query[b, q, h] / np.sqrt(CHANNELS) + bias[b, q]
        weights = np.exp(logits - logits.max())
        expected[b, q, h] = weights / weights.sum() @ value[b, :, h]
    return expected


def test_a_bias_is_added_and_hides_where_it_is_minus_infinity(arrays):
    rng = np.random.default_rng(1)
    bias = rng.normal(size=(2, QUERIES, KEYS)).astype(np.float32)
    bias[rng.random(bias.shape) < 0.4] = -np.inf
    bias[:, :, 0] = 0.5  # something is left to see
    actual = attention.attend(*arrays, jnp.asarray(bias[:, None]))
    np.testing.assert_allclose(actual, by_definition(*arrays, bias), rtol=1e-5, atol=1e-6)


def test_causal_attention_sees_no_later_token(arrays):
    _, key, value = arrays
    hidden = np.where(np.tri(KEYS, dtype=bool), 0, -np.inf)[None].repeat(2, 0)
    actual = attention.attend(key, key, value, is_causal=True)
    np.testing.assert_allclose(actual, by_definition(key, key, value, hidden), rtol=1e-5, atol=1e-6)


def device(platform="gpu", version="PJRT C API\ncuda 13000", capability="9.0"):
    client = SimpleNamespace(platform_version=version)
    return SimpleNamespace(platform=platform, client=client, compute_capability=capability)


def query(count=197, head=64, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((4, count, 12, head), dtype)


@pytest.mark.parametrize(
    ("found", "given", "fused"),
    [
        (device(), query(), True),
        (device(capability="8.0"), query(dtype=jnp.float16), True),
        (device(capability="12.0"), query(head=128), True),
        (device(capability="7.5"), query(), False),
        (device("cpu", "cpu"), query(), False),
        (device(version="rocm 60000", capability="gfx942"), query(), False),
        (device(), query(dtype=jnp.float32), False),
        (device(), query(count=1), False),
        (device(), query(head=20), False),
        (device(), query(head=136), False),
    ],
)
def test_the_fused_kernel_is_asked_for_where_it_computes(found, given, fused):
    with compiling_for(found):
        assert attention.has_fused_kernel(given) == fused


@pytest.mark.parametrize(("bias", "kernel"), [(None, "cudnn"), (np.zeros((1, 1, 3, 5)), None)])
def test_a_bias_takes_the_general_kernel(monkeypatch, arrays, bias, kernel):
    asked = []
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *_, **given: asked.append(given["implementation"])
    )
    with compiling_for(device()):
        attention.attend(*(jnp.asarray(x, jnp.bfloat16) for x in arrays), bias)
    assert asked == [kernel]
