"""The first stage: a convolutional autoencoder (Rombach et al. 2022, §3.1 and §G), here with KL.

`ldm_jax.models.vq` has the one with a codebook, with the same encoder and decoder.

The encoder maps an image x (B, H, W, 3) in [−1, 1] to a diagonal Gaussian over latents (B, H/f,
W/f, C) with f = patch_size·2^(levels−1); the decoder maps latents to images. Field names are those
of the original configurations. Three are ours: `patch_size` (the originals always use single
pixels, which takes most of the time on a CPU and gains little), `local` and `encoder_ch`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.attention import SpatialSelfAttention
from ldm_jax.models.layers import (
    GroupNorm,
    LayerNorm,
    check_channels,
    check_sides,
    conv,
    level_widths,
)
from ldm_jax.models.remat import rematerialised


def norm(groups: int, name: str, **types) -> nn.Module:
    """Normalisation over groups of channels and all pixels; with no groups, of each pixel alone."""
    if groups:
        return GroupNorm(groups, 1e-6, name=name, **types)
    return LayerNorm(1e-6, use_fast_variance=False, name=name, **types)


class ResnetBlock(nn.Module):
    """Norm, swish, convolution, twice, plus a shortcut (1×1 if the width changes)."""

    features: int
    groups: int = 32
    dropout: float = 0.0
    kernel: int = 3
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        h = nn.swish(norm(self.groups, "norm1", **types)(x))
        h = conv(self.features, self.kernel, name="conv1", **types)(h)
        h = nn.swish(norm(self.groups, "norm2", **types)(h))
        h = nn.Dropout(self.dropout, deterministic=deterministic)(h)
        h = conv(self.features, self.kernel, name="conv2", **types)(h)
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, name="nin_shortcut", **types)(x)
        return x + h


def space_to_depth(x: jax.Array, size: int) -> jax.Array:
    """(B, H, W, C) → (B, H/size, W/size, size²·C): each patch of pixels becomes one."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.swapaxes(2, 3).reshape(batch, height // size, width // size, size * size * channels)


def depth_to_space(x: jax.Array, size: int) -> jax.Array:
    """Inverse of `space_to_depth`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, size, size, channels // size**2).swapaxes(2, 3)
    return x.reshape(batch, height * size, width * size, channels // size**2)


def _blocks(model: nn.Module, kernel: int = 3) -> tuple[Callable, Callable]:
    """Functions that make a ResnetBlock and an attention from an encoder's or decoder's fields."""
    types = dict(dtype=model.dtype, param_dtype=model.param_dtype)

    def resnet(features, name):
        block = rematerialised(ResnetBlock, model.remat, static=(2,))
        return block(features, model.groups, model.dropout, kernel, name=name, **types)

    def attention(name):
        block = rematerialised(SpatialSelfAttention, model.remat)
        return block(model.groups, name=name, **types)

    return resnet, attention


class Encoder(nn.Module):
    """(B, H, W, C) → (B, H/f, W/f, out_channels).

    `kernel`: of the convolutions after the first, but for those that halve the sides.
    """

    ch: int
    ch_mult: tuple[float, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    resolution: int
    out_channels: int
    patch_size: int = 1
    mid_attn: bool = True
    groups: int = 32
    dropout: float = 0.0
    kernel: int = 3
    remat: str = ""
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        resnet, attention = _blocks(self, self.kernel)

        check_sides(x, "images", self.patch_size * 2 ** (len(self.ch_mult) - 1))
        h = conv(self.ch, name="conv_in", **types)(space_to_depth(x, self.patch_size))
        resolution = self.resolution
        for level, width in enumerate(level_widths(self.ch, self.ch_mult)):
            for j in range(self.num_res_blocks):
                h = resnet(width, f"down_{level}_block_{j}")(h, deterministic)
                if resolution in self.attn_resolutions:
                    h = attention(f"down_{level}_attn_{j}")(h)
            if level < len(self.ch_mult) - 1:
                # Zeros on the right and bottom only: the first 3×3 window starts at pixel 0.
                padding = ((0, 1), (0, 1))
                name = f"down_{level}_downsample"
                h = conv(width, stride=2, padding=padding, name=name, **types)(h)
                resolution //= 2
        h = resnet(h.shape[-1], "mid_block_1")(h, deterministic)
        if self.mid_attn:
            h = attention("mid_attn_1")(h)
        h = resnet(h.shape[-1], "mid_block_2")(h, deterministic)
        h = nn.swish(norm(self.groups, "norm_out", **types)(h))
        return conv(self.out_channels, self.kernel, name="conv_out", **types)(h)


class Decoder(nn.Module):
    """(B, h, w, z) → (B, fh, fw, ch): everything before the last convolution."""

    ch: int
    ch_mult: tuple[float, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    resolution: int
    mid_attn: bool = True
    groups: int = 32
    dropout: float = 0.0
    remat: str = ""
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array, deterministic: bool = True) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        resnet, attention = _blocks(self)
        widths = level_widths(self.ch, self.ch_mult)
        h = conv(widths[-1], name="conv_in", **types)(z)
        h = resnet(h.shape[-1], "mid_block_1")(h, deterministic)
        if self.mid_attn:
            h = attention("mid_attn_1")(h)
        h = resnet(h.shape[-1], "mid_block_2")(h, deterministic)
        for level in reversed(range(len(widths))):
            resolution = self.resolution // 2**level
            for j in range(self.num_res_blocks + 1):
                h = resnet(widths[level], f"up_{level}_block_{j}")(h, deterministic)
                if resolution in self.attn_resolutions:
                    h = attention(f"up_{level}_attn_{j}")(h)
            if level:
                h = conv(h.shape[-1], upsampled=True, name=f"up_{level}_upsample", **types)(h)
        return nn.swish(norm(self.groups, "norm_out", **types)(h))


def encoder_and_decoder(model: nn.Module, out_channels: int) -> tuple[Encoder, Decoder]:
    """The encoder and decoder from the fields of an autoencoder, for its `setup`."""
    names = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution", "mid_attn")
    names += ("dropout", "remat", "dtype", "param_dtype")
    shared = {name: getattr(model, name) for name in names}
    if model.local and (model.mid_attn or model.attn_resolutions):
        raise ValueError("autoencoder.local needs mid_attn=False and no attn_resolutions")
    shared["groups"] = 0 if model.local else model.groups
    own = dict(ch=model.encoder_ch or model.ch, kernel=1 if model.local else 3)
    encoder = Encoder(out_channels=out_channels, patch_size=model.patch_size, **shared | own)
    return encoder, Decoder(**shared)


class AutoencoderKL(nn.Module):
    """KL autoencoder. Outside it, latents are already multiplied by `scale_factor`.

    `resolution` is nominal: it only places attention (`attn_resolutions` at levels of that size,
    the first level counting as `resolution` whatever the `patch_size`);
    any height and width divisible by `downsampling` are allowed. Level i has ch·ch_mult[i]
    channels, rounded; `groups` must divide every width.
    The originals' `attn_type: none` is `mid_attn=False` without `attn_resolutions`. Without
    `use_quant_conv` (SGM's own autoencoders, SD 3) the encoder's output is the moments.
    With `local` (ours), the latents of a place depend only on the pixels near it, so an object has
    the same latents whatever else is in the picture: the encoder's convolutions are 1×1, but for
    the first and those that halve the sides, and each pixel of the layers is normalised alone, in
    the decoder too. There is no attention then, and `groups` has no meaning.
    `encoder_ch` (ours) is the encoder's `ch`; 0: as the decoder's.
    `remat` names what blocks keep for the backward pass: see `models/remat.py`.

    Raises ValueError for pictures or latents of other channels or indivisible sides, and for
    attention with `local`.
    """

    ch: int = 128
    ch_mult: tuple[float, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = ()
    resolution: int = 256
    in_channels: int = 3
    out_ch: int = 3
    z_channels: int = 4
    embed_dim: int = 4
    mid_attn: bool = True
    use_quant_conv: bool = True
    groups: int = 32
    dropout: float = 0.0
    patch_size: int = 1
    local: bool = False
    encoder_ch: int = 0
    scale_factor: float = 1.0
    remat: str = ""
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    def setup(self):
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.encoder, self.decoder = encoder_and_decoder(self, 2 * self.z_channels)
        self.conv_out = conv(self.out_ch * self.patch_size**2, **types)
        if self.use_quant_conv:
            self.quant_conv = conv(2 * self.embed_dim, 1, **types)
            self.post_quant_conv = conv(self.z_channels, 1, **types)
        elif self.embed_dim != self.z_channels:
            raise ValueError(
                f"AutoencoderKL without quant_conv: embed_dim={self.embed_dim} must equal "
                f"z_channels={self.z_channels}"
            )

    @property
    def downsampling(self) -> int:
        return self.patch_size * 2 ** (len(self.ch_mult) - 1)

    def moments(self, x: jax.Array, deterministic: bool = True) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance (clamped to [−30, 20]) of the posterior, unscaled, float32."""
        check_channels(x, "AutoencoderKL with in_channels", self.in_channels)
        h = self.encoder(x, deterministic)
        moments = (self.quant_conv(h) if self.use_quant_conv else h).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def encode(self, x: jax.Array) -> jax.Array:
        """Scaled latents at the posterior's mean: (B, H, W, 3) → (B, H/f, W/f, embed_dim)."""
        return self.moments(x)[0] * self.scale_factor

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images (B, H, W, 3), about [−1, 1], from scaled latents (B, H/f, W/f, embed_dim)."""
        return self.last_layer(self.features(latents / self.scale_factor))

    def features(self, z: jax.Array, deterministic: bool = True) -> jax.Array:
        """The last convolution's input (B, H, W, ch) for *unscaled* latents z."""
        check_channels(z, "AutoencoderKL with embed_dim", self.embed_dim)
        return self.decoder(self.post_quant_conv(z) if self.use_quant_conv else z, deterministic)

    def last_layer(self, features: jax.Array) -> jax.Array:
        """The last convolution; separate, because its gradient weights LDM's adversarial loss."""
        return depth_to_space(self.conv_out(features), self.patch_size).astype(jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Reconstruction through the posterior's mean."""
        return self.decode(self.encode(x))


class Identity(nn.Module):
    """Pixels in place of latents: diffusion without a first stage. It has no parameters."""

    in_channels: int = 3
    scale_factor: float = 1.0
    dtype: jax.typing.DTypeLike | None = None

    embed_dim = property(lambda self: self.in_channels)
    downsampling = 1

    def moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The pixels as mean of a posterior of variance 0."""
        return x, jnp.full_like(x, -jnp.inf)

    def encode(self, x: jax.Array) -> jax.Array:
        """Pixels times `scale_factor`."""
        return x * self.scale_factor

    def decode(self, latents: jax.Array) -> jax.Array:
        """Pixels again."""
        return latents / self.scale_factor

    def __call__(self, x: jax.Array) -> jax.Array:
        """The pixels."""
        return x
