"""Attention and the transformer blocks of latent diffusion (Rombach et al. 2022, §3.3)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.dot_product import attend
from ldm_jax.models.layers import Dense, GroupNorm, Layer, LayerNorm, conv, uniform_init
from ldm_jax.models.remat import rematerialised

# A collection of variables, by the path of an attention: see `Attention`.
IMAGES = "images"


class Attention(nn.Module):
    """Attention on tokens (B, L, C) to themselves or to a `context` (B, S, D).

    In the collection `IMAGES` it may have `pairs` of keys and values, each (B, N, heads·head_dim),
    of picture prompts: it attends to each of them as well, and adds what it gets (Ye et al. 2023,
    eq. 5).
    """

    heads: int
    head_dim: int
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        context = x if context is None else context
        options = dict(kernel_init=uniform_init, dtype=self.dtype, param_dtype=self.param_dtype)
        width = self.heads * self.head_dim

        def project(name, tokens):
            projected = Dense(width, use_bias=False, name=name, **options)(tokens)
            return projected.reshape(*tokens.shape[:-1], self.heads, self.head_dim)

        query = project("to_q", x)
        out = attend(query, project("to_k", context), project("to_v", context))
        for pair in self.get_variable(IMAGES, "pairs", ()):
            own = (v.astype(query.dtype) for v in pair)
            out = out + attend(query, *(v.reshape(*v.shape[:2], *query.shape[2:]) for v in own))
        out = out.reshape(*x.shape[:-1], width)
        return Dense(x.shape[-1], name="to_out", **options)(out)


class GatedDense(Layer):
    """A linear layer that returns value and gate separately: (…, C) → 2 × (…, features).

    It uses two products on slices of the kernel: with one product that is split, XLA:CPU recomputes
    the gate's erf for every use, and the gradient takes twice as long.
    """

    features: int
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (x.shape[-1], 2 * self.features)
        kernel = self.param("kernel", uniform_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[1:], self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        value, gate = slice(self.features), slice(self.features, None)
        return x @ kernel[:, value] + bias[value], x @ kernel[:, gate] + bias[gate]


class FeedForward(nn.Module):
    """Two-layer perceptron, four times as wide inside; GEGLU (Shazeer 2020) or plain GELU.

    GELU is the exact erf form. With `gated`, the first half of the projection is the value and the
    second the gate, as in the originals.
    """

    gated: bool
    dropout: float = 0.0
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        options = dict(kernel_init=uniform_init, **types)
        width = 4 * x.shape[-1]
        if self.gated:
            value, gate = GatedDense(width, name="proj_in", **types)(x)
            h = value * nn.gelu(gate, approximate=False)
        else:
            h = Dense(width, name="proj_in", **options)(x)
            h = nn.gelu(h, approximate=False)
        h = nn.Dropout(self.dropout, deterministic=deterministic)(h)
        return Dense(x.shape[-1], name="proj_out", **options)(h)


class TransformerBlock(nn.Module):
    """x + self-attention, x + cross-attention, x + GEGLU, each on a LayerNorm (LDM, §3.3).

    Without a context both attentions are to x itself; with `disable_self_attn` both are to the
    context (SD 2's upscaler).
    """

    heads: int
    head_dim: int
    dropout: float = 0.0
    disable_self_attn: bool = False
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, deterministic: bool = True
    ) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        drop = nn.Dropout(self.dropout, deterministic=deterministic)

        def norm(name):
            return LayerNorm(epsilon=1e-5, name=name, use_fast_variance=False, **types)

        def attention(name):
            return Attention(self.heads, self.head_dim, name=name, **types)

        own = context if self.disable_self_attn else None
        x = x + drop(attention("attn1")(norm("norm1")(x), own))
        x = x + drop(attention("attn2")(norm("norm2")(x), context))
        feed_forward = FeedForward(gated=True, dropout=self.dropout, name="ff", **types)
        return x + feed_forward(norm("norm3")(x), deterministic)


class SpatialTransformer(nn.Module):
    """Transformer over the pixels of (B, H, W, C), with a context (B, S, D) to cross-attend.

    The originals project by a 1×1 convolution (LDM, SD 1) or, flattened, by a matrix (SD 2, SDXL):
    the same product, which checkpoints store differently. Here it is always a matrix.

    With `remat`, each of its blocks is rematerialised: see `models/remat.py`.
    """

    heads: int
    head_dim: int
    depth: int = 1
    groups: int = 32
    dropout: float = 0.0
    disable_self_attn: bool = False
    remat: str = ""
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, deterministic: bool = True
    ) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        batch, height, width, channels = x.shape
        # 1e-6 here and 1e-5 in the other norms of the UNet, as in the originals.
        h = GroupNorm(self.groups, 1e-6, name="norm", **types)(x)
        h = h.reshape(batch, height * width, channels)
        inner = self.heads * self.head_dim
        h = Dense(inner, name="proj_in", kernel_init=uniform_init, **types)(h)
        for i in range(self.depth):
            block = rematerialised(TransformerBlock, self.remat, static=(3,))(
                self.heads,
                self.head_dim,
                self.dropout,
                self.disable_self_attn,
                name=f"transformer_blocks_{i}",
                **types,
            )
            h = block(h, context, deterministic)
        h = Dense(channels, name="proj_out", kernel_init=nn.initializers.zeros, **types)(h)
        return x + h.reshape(batch, height, width, channels)


class SpatialSelfAttention(nn.Module):
    """Single-head self-attention over the pixels of (B, H, W, C): the autoencoder's AttnBlock."""

    groups: int = 32
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        batch, height, width, channels = x.shape
        h = GroupNorm(self.groups, 1e-6, name="norm", **types)(x)

        def project(name):
            projected = conv(channels, 1, name=name, **types)(h)
            return projected.reshape(batch, height * width, 1, channels)

        out = attend(project("q"), project("k"), project("v"))
        out = out.reshape(batch, height, width, channels)
        return x + conv(channels, 1, name="proj_out", **types)(out)
