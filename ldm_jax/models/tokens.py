"""The embedding of tokens, and of those that were added to a trained model (textual inversion)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.layers import Layer

ADDED = "added_"  # beside "embedding": "added_0" (n, width) are the vectors of the first new token


class TokenEmbed(Layer):
    """Ids (B, L), int → (B, L, width).

    The ids from `vocab_size` on are the vectors of added tokens, `added` of each, in their order,
    in parameters of their own. An id that is too high gives NaN under jit.
    """

    vocab_size: int
    width: int
    added: tuple[int, ...] = ()
    embedding_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        def rows(name, count):
            shape = (count, self.width)
            return self.param(name, self.embedding_init, shape, self.param_dtype)

        table = rows("embedding", self.vocab_size)
        added = [rows(f"{ADDED}{i}", count) for i, count in enumerate(self.added)]
        table, *added = nn.dtypes.promote_dtype(table, *added, dtype=self.dtype, inexact=False)
        if not added:
            return jnp.take(table, ids, axis=0)
        # The large table is not copied, and in training has no gradient of its size.
        known = jnp.take(table, jnp.minimum(ids, self.vocab_size - 1), axis=0)
        later = jnp.take(jnp.concatenate(added), jnp.maximum(ids - self.vocab_size, 0), axis=0)
        return jnp.where((ids < self.vocab_size)[..., None], known, later)
