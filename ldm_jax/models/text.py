"""LDM's own text encoder: a BERT-style transformer trained with the UNet."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.attention import Attention, FeedForward
from ldm_jax.models.layers import Layer, LayerNorm
from ldm_jax.models.tokens import TokenEmbed


class TextTransformer(Layer):
    """Tokens (B, L ≤ max_length), int → (B, L, width): Rombach et al. 2022, §D.3 and §E.2.

    Pre-norm blocks with learned absolute positions and no mask: padding is attended to, as in the
    originals, which always pad to the full length. `added`: see `TokenEmbed`.
    """

    vocab_size: int = 30522
    width: int = 1280
    depth: int = 32
    heads: int = 8
    head_dim: int = 64
    max_length: int = 77
    dropout: float = 0.0
    added: tuple[int, ...] = ()
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, deterministic: bool = True) -> jax.Array:
        if tokens.shape[1] > self.max_length:
            raise ValueError(f"{tokens.shape[1]} tokens, but max_length is {self.max_length}")
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        normal = nn.initializers.normal(0.02)

        def norm(name):
            return LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name, **types)

        embed = TokenEmbed(self.vocab_size, self.width, self.added, name="token_emb", **types)
        positions = self.param("pos_emb", normal, (self.max_length, self.width), self.param_dtype)
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        h = embed(tokens)
        h = drop(h + positions[: tokens.shape[1]].astype(h.dtype))
        for i in range(self.depth):
            attention = Attention(self.heads, self.head_dim, name=f"layers_{i}_attn", **types)
            h = h + drop(attention(norm(f"layers_{i}_norm1")(h)))
            feed_forward = FeedForward(gated=False, name=f"layers_{i}_ff", **types)
            h = h + drop(feed_forward(norm(f"layers_{i}_norm2")(h), deterministic))
        return norm("norm")(h)
