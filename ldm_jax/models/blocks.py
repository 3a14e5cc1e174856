"""The blocks of UNets: residual ones, and plain self-attention (Dhariwal & Nichol 2021)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.dot_product import attend
from ldm_jax.models.layers import Dense, GroupNorm, average_pool, conv, uniform_init, upsample


class ResBlock(nn.Module):
    """Residual block with the time embedding: (B, H, W, C) and (B, E) → (B, H', W', features).

    `resize` "up" or "down" doubles or halves the picture inside the block (`resblock_updown`).
    """

    features: int
    groups: int = 32
    dropout: float = 0.0
    scale_shift_norm: bool = False
    resize: str = ""
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, deterministic: bool = True) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        h = nn.silu(GroupNorm(self.groups, name="in_layers_0", **types)(x))
        if self.resize == "down":
            h, x = average_pool(h), average_pool(x)
        up = self.resize == "up"
        h = conv(self.features, upsampled=up, name="in_layers_2", **types)(h)
        x = upsample(x) if up else x

        width = 2 * self.features if self.scale_shift_norm else self.features
        dense = Dense(width, kernel_init=uniform_init, name="emb_layers_1", **types)
        emb = dense(nn.silu(emb))[:, None, None, :]
        norm = GroupNorm(self.groups, name="out_layers_0", **types)
        if self.scale_shift_norm:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = norm(h) * (1.0 + scale) + shift
        else:
            h = norm(h + emb)
        h = nn.Dropout(self.dropout, deterministic=deterministic)(nn.silu(h))
        h = conv(self.features, zero_init=True, name="out_layers_3", **types)(h)
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, name="skip_connection", **types)(x)
        return x + h


class AttentionBlock(nn.Module):
    """Multi-head self-attention over pixels, channels grouped head first, then q, k, v."""

    heads: int
    groups: int = 32
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        batch, height, width, channels = x.shape
        h = GroupNorm(self.groups, name="norm", **types)(x)
        h = h.reshape(batch, height * width, channels)
        qkv = Dense(3 * channels, kernel_init=uniform_init, name="qkv", **types)(h)
        qkv = qkv.reshape(batch, height * width, self.heads, 3, channels // self.heads)
        h = attend(qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :])
        h = h.reshape(batch, height * width, channels)
        h = Dense(channels, kernel_init=nn.initializers.zeros, name="proj_out", **types)(h)
        return x + h.reshape(batch, height, width, channels)
