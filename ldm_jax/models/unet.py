"""The denoising UNet of latent diffusion (Rombach et al. 2022, §3.2–3.3; Dhariwal & Nichol 2021).

Modules carry the originals' names (`input_blocks_3_0` is their `input_blocks.3.0`), so that a
checkpoint's keys can be read off.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.attention import SpatialTransformer, attend
from ldm_jax.models.autoencoder import upsample
from ldm_jax.models.layers import GroupNorm, conv, uniform_init


def timestep_embedding(t: jax.Array, dim: int) -> jax.Array:
    """Sinusoids of timesteps (B,), 0…1000 and possibly fractional → (B, dim), cosines first."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def average_pool(x: jax.Array) -> jax.Array:
    """Mean of 2×2 pixels: (B, 2H, 2W, C) → (B, H, W, C)."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


class ResBlock(nn.Module):
    """Residual block told the time: (B, H, W, C) and (B, E) → (B, H', W', features).

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
        resize = {"": lambda h: h, "up": upsample, "down": average_pool}[self.resize]
        h = nn.silu(GroupNorm(self.groups, name="in_layers_0", **types)(x))
        h = conv(self.features, name="in_layers_2", **types)(resize(h))
        x = resize(x)

        width = 2 * self.features if self.scale_shift_norm else self.features
        dense = nn.Dense(width, kernel_init=uniform_init, name="emb_layers_1", **types)
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
        qkv = nn.Dense(3 * channels, kernel_init=uniform_init, name="qkv", **types)(h)
        qkv = qkv.reshape(batch, height * width, self.heads, 3, channels // self.heads)
        h = attend(qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :])
        h = h.reshape(batch, height * width, channels)
        h = nn.Dense(channels, kernel_init=nn.initializers.zeros, name="proj_out", **types)(h)
        return x + h.reshape(batch, height, width, channels)


class UNet(nn.Module):
    """Noisy latents (B, h, w, in_channels) at timesteps (B,) → (B, h, w, out_channels).

    With `context_dim` every attention is a SpatialTransformer over `context` (B, L, context_dim),
    without it a plain AttentionBlock. `attention_resolutions` are *down-sampling factors* at which
    there is attention, as in the originals. Exactly one of `num_heads` and `num_head_channels`
    counts: the latter if it is positive.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    num_heads: int = 8
    num_head_channels: int = -1
    context_dim: int | None = None
    transformer_depth: int = 1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    groups: int = 32
    dropout: float = 0.0
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    def _check(self, x: jax.Array, context: jax.Array | None) -> None:
        """Raises ValueError for shapes that would fail late, or build another network."""
        if x.shape[-1] != self.in_channels:
            raise ValueError(f"UNet with in_channels={self.in_channels} got {x.shape[-1]}")
        width = None if context is None else context.shape[-1]
        if width != self.context_dim:
            shape = None if context is None else context.shape
            raise ValueError(f"UNet with context_dim={self.context_dim} got context={shape}")
        factor = 2 ** (len(self.channel_mult) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(f"UNet latents {x.shape[1:3]}: sides must be multiples of {factor}")

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        context: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self._check(x, context)

        def resblock(name, features, resize=""):
            return ResBlock(
                features,
                self.groups,
                self.dropout,
                self.use_scale_shift_norm,
                resize,
                name=name,
                **types,
            )

        def attention(name, h):
            channels = h.shape[-1]
            by_width = self.num_head_channels > 0
            if channels % (self.num_head_channels if by_width else self.num_heads):
                raise ValueError(
                    f"UNet: {channels} channels do not divide into heads (num_heads="
                    f"{self.num_heads}, num_head_channels={self.num_head_channels})"
                )
            heads = channels // self.num_head_channels if by_width else self.num_heads
            if self.context_dim is None:
                return AttentionBlock(heads, self.groups, name=name, **types)(h)
            transformer = SpatialTransformer(
                heads,
                channels // heads,
                self.transformer_depth,
                self.groups,
                self.dropout,
                name=name,
                **types,
            )
            return transformer(h, context, deterministic)

        # Time.
        emb = timestep_embedding(t, self.model_channels).astype(self.dtype or x.dtype)
        for name in ("time_embed_0", "time_embed_2"):
            emb = nn.silu(emb) if name == "time_embed_2" else emb
            width = 4 * self.model_channels
            emb = nn.Dense(width, kernel_init=uniform_init, name=name, **types)(emb)

        # Down: every block's output is kept for the way up.
        h = conv(self.model_channels, name="input_blocks_0_0", **types)(x)
        skips, levels = [h], len(self.channel_mult)
        for level, mult in enumerate(self.channel_mult):
            attends = 2**level in self.attention_resolutions
            for _ in range(self.num_res_blocks):
                name, features = f"input_blocks_{len(skips)}", mult * self.model_channels
                h = resblock(f"{name}_0", features)(h, emb, deterministic)
                h = attention(f"{name}_1", h) if attends else h
                skips.append(h)
            if level < levels - 1:
                name = f"input_blocks_{len(skips)}_0"
                if self.resblock_updown:
                    h = resblock(name, h.shape[-1], "down")(h, emb, deterministic)
                else:
                    h = conv(h.shape[-1], stride=2, name=name, **types)(h)
                skips.append(h)

        h = resblock("middle_block_0", h.shape[-1])(h, emb, deterministic)
        h = attention("middle_block_1", h)
        h = resblock("middle_block_2", h.shape[-1])(h, emb, deterministic)

        # Up: each block takes one skip.
        for level in reversed(range(levels)):
            attends = 2**level in self.attention_resolutions
            for i in range(self.num_res_blocks + 1):
                # Numbered by what the way up has consumed.
                name = f"output_blocks_{(self.num_res_blocks + 1) * levels - len(skips)}"
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                features = self.channel_mult[level] * self.model_channels
                h = resblock(f"{name}_0", features)(h, emb, deterministic)
                h = attention(f"{name}_1", h) if attends else h
                if level and i == self.num_res_blocks:
                    name = f"{name}_{2 if attends else 1}"
                    if self.resblock_updown:
                        h = resblock(name, h.shape[-1], "up")(h, emb, deterministic)
                    else:
                        h = conv(h.shape[-1], name=name, **types)(upsample(h))

        h = nn.silu(GroupNorm(self.groups, name="out_0", **types)(h))
        return conv(self.out_channels, zero_init=True, name="out_2", **types)(h)
