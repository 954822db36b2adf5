"""DETR's transformer (Carion et al., 2020), post-norm: encoder, and decoder of learned queries."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zegformer_jax.models.layers import layer_norm
from zegformer_jax.runtime.errors import UserError

POSITION_TEMPERATURE = 10_000.0  # DETR, appendix A.4
POSITION_EPSILON = 1e-6


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


class Layer(nn.Module):
    """Base of the encoder's and the decoder's layers.

    Attributes:
        heads: Attention heads.
        mlp_width: Hidden channels of the feed-forward part.
        dropout: Dropout rate of attention weights and of every residual branch.
        deterministic: Turns dropout off.
        dtype: Compute dtype; parameters are float32.
    """

    heads: int
    mlp_width: int
    dropout: float
    deterministic: bool
    dtype: jnp.dtype

    def attend(self, name: str, queries: jax.Array, keys: jax.Array, values: jax.Array):
        """Attention of queries [B, Q, width] to keys and values [B, K, width]."""
        attention = nn.MultiHeadDotProductAttention(
            self.heads,
            dropout_rate=self.dropout,
            broadcast_dropout=False,
            deterministic=self.deterministic,
            kernel_init=nn.initializers.xavier_uniform(),
            dtype=self.dtype,
            name=name,
        )
        with warnings.catch_warnings():
            # Where there are as many tokens as channels, flax takes the values for a mask.
            warnings.filterwarnings("ignore", "You are passing an array of shape")
            return attention(queries, keys, values)

    def drop(self, x: jax.Array) -> jax.Array:
        """Dropout."""
        return nn.Dropout(self.dropout, deterministic=self.deterministic)(x)

    def add_and_norm(self, name: str, x: jax.Array, branch: jax.Array) -> jax.Array:
        """Adds a residual branch and norms the sum."""
        return layer_norm(name, self.dtype)(x + self.drop(branch))

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """Two linear layers with a relu between, [..., width] to the same."""

        def dense(features: int, name: str) -> nn.Dense:
            init = nn.initializers.xavier_uniform()
            return nn.Dense(features, dtype=self.dtype, kernel_init=init, name=name)

        hidden = self.drop(nn.relu(dense(self.mlp_width, "linear1")(x)))
        return dense(x.shape[-1], "linear2")(hidden)


class EncoderLayer(Layer):
    """Self-attention among pixels, feed-forward; post-norm."""

    @nn.compact
    def __call__(self, memory_bkd: jax.Array, positions_bkd: jax.Array) -> jax.Array:
        """Updates the memory [B, K, width] once."""
        keyed = memory_bkd + positions_bkd
        y = self.attend("self_attention", keyed, keyed, memory_bkd)
        x = self.add_and_norm("norm1", memory_bkd, y)
        return self.add_and_norm("norm2", x, self.feed_forward(x))


class DecoderLayer(Layer):
    """Self-attention among queries, cross-attention to the image, feed-forward; post-norm."""

    @nn.compact
    def __call__(
        self,
        states_bqd: jax.Array,
        queries_bqd: jax.Array,
        memory_bkd: jax.Array,
        positions_bkd: jax.Array,
    ) -> jax.Array:
        """Updates the queries' states [B, Q, width] once from the memory [B, K, width]."""
        keyed = states_bqd + queries_bqd
        y = self.attend("self_attention", keyed, keyed, states_bqd)
        x = self.add_and_norm("norm1", states_bqd, y)
        keys_bkd = memory_bkd + positions_bkd
        y = self.attend("cross_attention", x + queries_bqd, keys_bkd, memory_bkd)
        x = self.add_and_norm("norm2", x, y)
        return self.add_and_norm("norm3", x, self.feed_forward(x))


def flatten_map(features_bhwc: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Returns the pixels of a map as tokens [B, H * W, C], and their positions [1, H * W, C]."""
    batch, height, width, channels = features_bhwc.shape
    positions_hwc = sine_positions(height, width, channels)
    positions_bkc = jnp.asarray(positions_hwc, dtype).reshape(1, -1, channels)
    return features_bhwc.reshape(batch, height * width, channels), positions_bkc


class TransformerEncoder(nn.Module):
    """Pixels of one feature map that attend to one another. No norm follows the last layer.

    Attributes:
        layers: Encoder layers.
        heads: Attention heads.
        mlp_width: Hidden channels of the feed-forward parts.
        dropout: Dropout rate of attention weights and of every residual branch.
        dtype: Compute dtype; parameters are float32.
    """

    layers: int = 6
    heads: int = 8
    mlp_width: int = 2048
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features_bhwc: jax.Array, deterministic: bool = True) -> jax.Array:
        """Returns the encoded map, of the shape of the features [B, H, W, C].

        Needs the random stream `dropout` where it is not deterministic.
        """
        memory_bkc, positions_bkc = flatten_map(features_bhwc, self.dtype)
        sizes = (self.heads, self.mlp_width, self.dropout, deterministic, self.dtype)
        for index in range(self.layers):
            memory_bkc = EncoderLayer(*sizes, name=f"layer{index}")(memory_bkc, positions_bkc)
        return memory_bkc.reshape(features_bhwc.shape)


class TransformerDecoder(nn.Module):
    """Learned queries that attend to one feature map.

    Attributes:
        queries: Number of queries.
        width: Channels of queries and memory.
        layers: Decoder layers.
        heads: Attention heads.
        mlp_width: Hidden channels of the feed-forward parts.
        dropout: Dropout rate of attention weights and of every residual branch.
        project_input: Whether the map passes a 1x1 convolution first. Without one it must have
            `width` channels; checkpoints with a transformer in the pixel decoder have none.
        dtype: Compute dtype; parameters are float32.
    """

    queries: int = 100
    width: int = 256
    layers: int = 6
    heads: int = 8
    mlp_width: int = 2048
    dropout: float = 0.1
    project_input: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features_bhwc: jax.Array, deterministic: bool = True) -> jax.Array:
        """Returns the normed states after every layer, [L, B, Q, width].

        Needs the random stream `dropout` where it is not deterministic. Raises UserError where
        the map is not projected and has another width than the queries.
        """
        if self.project_input:
            project = nn.Conv(self.width, (1, 1), dtype=self.dtype, name="input_projection")
            features_bhwc = project(features_bhwc)
        elif features_bhwc.shape[-1] != self.width:
            raise UserError(
                f"transformer.project_input is off, but the map has {features_bhwc.shape[-1]} "
                f"channels and transformer.width is {self.width}: turn it on"
            )
        memory_bkd, positions_bkd = flatten_map(features_bhwc, self.dtype)
        query_embedding_qd = self.param(
            "query_embedding", nn.initializers.normal(1.0), (self.queries, self.width)
        )
        queries_bqd = query_embedding_qd.astype(self.dtype)[None]
        states_bqd = jnp.zeros((len(memory_bkd), self.queries, self.width), self.dtype)
        norm = layer_norm("norm", self.dtype)
        sizes = (self.heads, self.mlp_width, self.dropout, deterministic, self.dtype)
        states_lbqd = []
        for index in range(self.layers):
            layer = DecoderLayer(*sizes, name=f"layer{index}")
            states_bqd = layer(states_bqd, queries_bqd, memory_bkd, positions_bkd)
            states_lbqd.append(norm(states_bqd))
        return jnp.stack(states_lbqd)
