"""CLIP's text tower. Axes: b text, t token, w width, d joint embedding."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from zegformer_jax.models.clip.vit import TransformerBlock
from zegformer_jax.models.layers import layer_norm

TOKEN_STD = 0.02  # openai/CLIP model.py, initialize_parameters
POSITION_STD = 0.01


class TextTransformer(nn.Module):
    """CLIP's text tower: a causal transformer read at the end-of-text token."""

    vocab_size: int
    context_length: int
    width: int
    layers: int
    heads: int
    embed_dim: int
    eos_token_id: int | None = None
    activation: str = "quick_gelu"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens_bt: jax.Array) -> jax.Array:
        """Encodes token ids int32 [B, T], T <= context length, as float32 features [B, D].

        The features are not normalised. What follows the end-of-text token does not change them
        (attention is causal), so the padding may be cut. Raises ValueError where T is too large.
        """
        length = tokens_bt.shape[1]
        if length > self.context_length:
            raise ValueError(
                f"CLIP's text tower takes at most {self.context_length} tokens, got {length}"
            )
        tokens = nn.Embed(
            self.vocab_size,
            self.width,
            embedding_init=nn.initializers.normal(TOKEN_STD),
            dtype=self.dtype,
            name="token_embedding",
        )(tokens_bt)
        position_tw = self.param(
            "position_embedding",
            nn.initializers.normal(POSITION_STD),
            (self.context_length, self.width),
        )
        tokens += position_tw[None, :length].astype(self.dtype)
        for i in range(self.layers):
            tokens = TransformerBlock(
                self.heads,
                self.layers,
                self.activation,
                is_causal=True,
                dtype=self.dtype,
                name=f"block_{i}",
            )(tokens)
        end_b = _end_of_text(tokens_bt, self.eos_token_id)
        feature_bw = jnp.take_along_axis(tokens, end_b[:, None, None], axis=1)[:, 0]
        feature_bw = layer_norm("ln_final", self.dtype, fast_variance=True)(feature_bw)
        projection = self.param(
            "projection", nn.initializers.normal(self.width**-0.5), (self.width, self.embed_dim)
        )
        return (feature_bw @ projection.astype(self.dtype)).astype(jnp.float32)


def _end_of_text(tokens_bt: jax.Array, eos_token_id: int | None) -> jax.Array:
    """Finds the position [B] of the end-of-text token (see ClipConfig)."""
    marks = tokens_bt if eos_token_id is None else tokens_bt == eos_token_id
    return jnp.argmax(marks, axis=-1)
