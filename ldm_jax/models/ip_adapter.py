"""IP-Adapter: pictures as prompts (Ye et al. 2023, arXiv 2308.06721, §3.2).

A CLIP image encoder makes features of a picture, a small network makes tokens of these, and the
cross-attention of the UNet attends to them beside the text, with keys and values of their own
(decoupled cross-attention, eq. 4 and 5): see `attention.Attention`. Keys and values are the same at
every step, so they are computed once for a drawing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.build import tuples
from ldm_jax.models.clip import layer_norm
from ldm_jax.models.dot_product import attend
from ldm_jax.models.layers import Dense, Layer
from ldm_jax.models.vision_transformer import VisionTransformer

HEAD = 64  # the width of a resampler's heads


class Projection(nn.Module):
    """A picture's embedding (B, D) → tokens (B, tokens, width): a linear layer and a norm."""

    tokens: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Dense(self.tokens * self.width, name="proj")(x)
        return layer_norm("norm", 1e-5)(x.reshape(-1, self.tokens, self.width))


class Resampler(Layer):
    """A picture's patches (B, L, D) → tokens (B, tokens, width), of IP-Adapter Plus.

    Learned queries attend to the patches and to themselves, `depth` times (Flamingo's perceiver,
    Alayrac et al. 2022, §3.1.1). Within, all has `inner` channels; `heads` are of `HEAD` channels.
    """

    tokens: int
    width: int
    inner: int
    depth: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (1, self.tokens, self.inner)
        queries = self.param("latents", nn.initializers.normal(self.inner**-0.5), shape)
        h = jnp.broadcast_to(queries, (len(x), *shape[1:])).astype(x.dtype)
        x = Dense(self.inner, name="proj_in")(x)

        def dense(features, name, h):
            return Dense(features, use_bias=False, name=name)(h)

        def heads(h):
            return h.reshape(*h.shape[:2], self.heads, HEAD)

        total = self.heads * HEAD
        for i in range(self.depth):
            name = f"layers_{i}"
            seen = layer_norm(f"{name}_norm1", 1e-5)(x)
            own = layer_norm(f"{name}_norm2", 1e-5)(h)
            both = dense(2 * total, f"{name}_to_kv", jnp.concatenate([seen, own], axis=1))
            key, value = jnp.split(both, 2, axis=-1)
            out = attend(heads(dense(total, f"{name}_to_q", own)), heads(key), heads(value))
            h = h + dense(self.inner, f"{name}_to_out", out.reshape(*h.shape[:2], total))
            wide = dense(4 * self.inner, f"{name}_fc1", layer_norm(f"{name}_norm3", 1e-5)(h))
            h = h + dense(self.inner, f"{name}_fc2", nn.gelu(wide, approximate=False))
        return layer_norm("norm_out", 1e-5)(Dense(self.width, name="proj_out")(h))


class IPAdapter(nn.Module):
    """Pictures (B, side, side, 3), as the encoder takes them → (keys, values) of each attention.

    Both are (B, tokens, channels). Zeros alone stand for no picture: then the projection gets an
    embedding of zeros, and the resampler the patches of zeros, as in the original.

    Fields:
      encoder: makes embeddings or, if `hidden`, patches.
      tokens: of a picture.
      width: of a token.
      channels: of every cross-attention of the UNet, in the order of `places`.
      resampler: its inner, depth and heads; None: a projection.
    """

    encoder: VisionTransformer
    tokens: int
    width: int
    channels: tuple[int, ...]
    resampler: tuple[int, int, int] | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[tuple[jax.Array, jax.Array], ...]:
        x = self.encoder(images)
        if self.resampler is None:
            x = x * jnp.any(images != 0.0, axis=(1, 2, 3))[:, None].astype(x.dtype)
            tokens = Projection(self.tokens, self.width, name="image_proj")(x)
        else:
            sizes = (self.tokens, self.width, *self.resampler)
            tokens = Resampler(*sizes, name="image_proj")(x)

        def project(name, width):
            return Dense(width, use_bias=False, name=name)(tokens)

        return tuple(
            (project(f"to_k_{i}", width), project(f"to_v_{i}", width))
            for i, width in enumerate(self.channels)
        )


def make_ip_adapter(fields: dict[str, Any]) -> IPAdapter:
    """From JSON values of the fields."""
    fields = tuples(fields)
    return IPAdapter(**fields | dict(encoder=VisionTransformer(**fields["encoder"])))
