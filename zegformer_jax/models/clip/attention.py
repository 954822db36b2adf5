"""Attention of CLIP's towers, by the fused kernel where there is one.

Axes: b image or text, q the tokens that attend, t the tokens that are attended to, h head,
k channel of a head.
"""

import jax
import jax.numpy as jnp

from zegformer_jax.runtime.target import target_device

# cuDNN's kernel; see `jax.nn.dot_product_attention`.
FUSED_DTYPES = (jnp.bfloat16, jnp.float16)
FUSED_HEAD_MULTIPLE = 8
FUSED_HEAD_MOST = 128
AMPERE = 8  # first major compute capability that has it


def attend(
    query_bqhk: jax.Array,
    key_bthk: jax.Array,
    value_bthk: jax.Array,
    bias_bhqt: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """Multi-head attention; the softmax is in float32.

    Args:
        query_bqhk: Queries [B, Q, H, K].
        key_bthk: Keys [B, T, H, K].
        value_bthk: Values [B, T, H, K].
        bias_bhqt: float32, added to the logits [B, H, Q, T], any axis but the last two may be 1;
            nothing is attended to where it is -inf.
        is_causal: Hides the tokens after its own from each query.

    Returns:
        The weighted values [B, Q, H, K].
    """
    return jax.nn.dot_product_attention(
        query_bqhk,
        key_bthk,
        value_bthk,
        bias_bhqt,
        is_causal=is_causal,
        implementation="cudnn" if bias_bhqt is None and has_fused_kernel(query_bqhk) else None,
    )


def has_fused_kernel(query_bqhk: jax.Array) -> bool:
    """Returns whether cuDNN's kernel can compute these queries and gains by it.

    jax takes it only by its name: its default is XLA's everywhere. 100 crops of ViT-B/16 at
    bfloat16 took 0.71 of the time on an H200; with a bias, or for a single query, it gains nothing.
    """
    _, queries, _, head = query_bqhk.shape
    fits = head % FUSED_HEAD_MULTIPLE == 0 and head <= FUSED_HEAD_MOST and queries > 1
    if not fits or query_bqhk.dtype not in FUSED_DTYPES:
        return False
    device = target_device()
    is_nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version
    return is_nvidia and int(device.compute_capability.split(".")[0]) >= AMPERE
