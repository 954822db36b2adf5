"""DETR's transformer decoder (Carion et al., 2020), post-norm, with learned queries."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

POSITION_TEMPERATURE = 10_000.0  # DETR, appendix A.4
POSITION_EPSILON = 1e-6
LAYER_NORM_EPSILON = 1e-5  # PyTorch's default


def sine_positions(height: int, width: int, channels: int) -> np.ndarray:
    """DETR's sine position embedding, float32 [height, width, channels].

    The first half of the channels encodes the row, the second the column, both scaled to
    (0, 2 pi]; sines at even, cosines at odd channels.
    """
    half = channels // 2
    frequencies = POSITION_TEMPERATURE ** (2 * (np.arange(half) // 2) / half)

    def encode(size: int) -> np.ndarray:
        position = np.arange(1, size + 1) / (size + POSITION_EPSILON) * 2 * np.pi
        angles = position[:, None] / frequencies
        return np.where(np.arange(half) % 2 == 0, np.sin(angles), np.cos(angles))

    rows = np.broadcast_to(encode(height)[:, None], (height, width, half))
    columns = np.broadcast_to(encode(width)[None], (height, width, half))
    return np.concatenate([rows, columns], axis=-1).astype(np.float32)


def layer_norm(dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """Layer norm with PyTorch's epsilon."""
    return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, use_fast_variance=False, dtype=dtype, name=name)


class DecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention to the image, feed-forward; post-norm."""

    heads: int
    mlp_width: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        states_bqd: jax.Array,
        queries_bqd: jax.Array,
        memory_bkd: jax.Array,
        positions_bkd: jax.Array,
        deterministic: bool,
    ) -> jax.Array:
        """Updates the queries' states [B, Q, width] once from the memory [B, K, width]."""
        width = states_bqd.shape[-1]

        def attend(name: str, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
            attention = nn.MultiHeadDotProductAttention(
                self.heads,
                dropout_rate=self.dropout,
                broadcast_dropout=False,
                deterministic=deterministic,
                kernel_init=nn.initializers.xavier_uniform(),
                dtype=self.dtype,
                name=name,
            )
            with warnings.catch_warnings():
                # Where there are as many tokens as channels, flax takes the values for a mask.
                warnings.filterwarnings("ignore", "You are passing an array of shape")
                return attention(queries, keys, values)

        def dense(features: int, name: str) -> nn.Dense:
            init = nn.initializers.xavier_uniform()
            return nn.Dense(features, dtype=self.dtype, kernel_init=init, name=name)

        def drop(x: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout, deterministic=deterministic)(x)

        keyed = states_bqd + queries_bqd
        y = attend("self_attention", keyed, keyed, states_bqd)
        x = layer_norm(self.dtype, "norm1")(states_bqd + drop(y))
        y = attend("cross_attention", x + queries_bqd, memory_bkd + positions_bkd, memory_bkd)
        x = layer_norm(self.dtype, "norm2")(x + drop(y))
        y = dense(width, "linear2")(drop(nn.relu(dense(self.mlp_width, "linear1")(x))))
        return layer_norm(self.dtype, "norm3")(x + drop(y))


class TransformerDecoder(nn.Module):
    """Learned queries that attend to one feature map.

    Attributes:
        queries: number of queries.
        width: channels of queries and memory.
        layers: decoder layers.
        heads: attention heads.
        mlp_width: hidden channels of the feed-forward parts.
        dropout: rate, of attention weights and of every residual branch.
        dtype: what to compute in; parameters are float32.
    """

    queries: int = 100
    width: int = 256
    layers: int = 6
    heads: int = 8
    mlp_width: int = 2048
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features_bhwc: jax.Array, deterministic: bool = True) -> jax.Array:
        """Gives the normed states after every layer, [L, B, Q, width].

        Needs the random stream `dropout` where it is not deterministic.
        """
        batch, height, width = features_bhwc.shape[:3]
        project = nn.Conv(self.width, (1, 1), dtype=self.dtype, name="input_projection")
        memory_bkd = project(features_bhwc).reshape(batch, height * width, self.width)
        positions_hwd = sine_positions(height, width, self.width)
        positions_bkd = jnp.asarray(positions_hwd, self.dtype).reshape(1, -1, self.width)
        query_embedding_qd = self.param(
            "query_embedding", nn.initializers.normal(1.0), (self.queries, self.width)
        )
        queries_bqd = query_embedding_qd.astype(self.dtype)[None]
        states_bqd = jnp.zeros((batch, self.queries, self.width), self.dtype)
        norm = layer_norm(self.dtype, "norm")
        states_lbqd = []
        for index in range(self.layers):
            layer = DecoderLayer(
                self.heads, self.mlp_width, self.dropout, self.dtype, name=f"layer{index}"
            )
            states_bqd = layer(states_bqd, queries_bqd, memory_bkd, positions_bkd, deterministic)
            states_lbqd.append(norm(states_bqd))
        return jnp.stack(states_lbqd)
