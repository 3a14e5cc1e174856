"""A tiny autoencoder for previews: TAESD (O. Boer Bohan, 2023) in the layout of diffusers.

Convolutions and ReLUs of one width, trained to reproduce the latents of a large autoencoder. Layers
are numbered as in diffusers, where layers without parameters count as well.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.layers import check_channels, check_sides, conv


class TinyBlock(nn.Module):
    """ReLU of the sum of (B, H, W, C) and three 3×3 convolutions of it."""

    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        h = nn.relu(conv(x.shape[-1], name="conv_0", **types)(x))
        h = nn.relu(conv(x.shape[-1], name="conv_2", **types)(h))
        return nn.relu(x + conv(x.shape[-1], name="conv_4", **types)(h))


class TinyEncoder(nn.Module):
    """Images (B, H, W, C) in [−1, 1] → (B, H/f, W/f, out_channels)."""

    out_channels: int
    width: int
    blocks: tuple[int, ...]
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        h = conv(self.width, name="layers_0", **types)((x + 1.0) / 2.0)
        layer = 1
        for level, blocks in enumerate(self.blocks):
            if level:
                strided = dict(stride=2, use_bias=False)
                h = conv(self.width, name=f"layers_{layer}", **strided, **types)(h)
                layer += 1
            for _ in range(blocks):
                h = TinyBlock(name=f"layers_{layer}", **types)(h)
                layer += 1
        return conv(self.out_channels, name=f"layers_{layer}", **types)(h)


class TinyDecoder(nn.Module):
    """Latents (B, h, w, C) → images (B, fh, fw, out_channels), about [−1, 1]."""

    out_channels: int
    width: int
    blocks: tuple[int, ...]
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        h = nn.relu(conv(self.width, name="layers_0", **types)(3.0 * jnp.tanh(z / 3.0)))
        layer = 2
        for level, blocks in enumerate(self.blocks):
            if level:
                options = dict(upsampled=True, use_bias=False, **types)
                h = conv(self.width, name=f"layers_{layer + 1}", **options)(h)
                layer += 2
            for _ in range(blocks):
                h = TinyBlock(name=f"layers_{layer}", **types)(h)
                layer += 1
        return 2.0 * conv(self.out_channels, name=f"layers_{layer}", **types)(h) - 1.0


class TinyAutoencoder(nn.Module):
    """Images (B, H, W, 3) in [−1, 1] ⇄ latents (B, H/f, W/f, latent_channels).

    Its latents are those of the large autoencoder times its `scale_factor`. `encoder_blocks` and
    `decoder_blocks` have one entry for each level, f = 2^(levels−1).

    Raises ValueError for pictures or latents of other channels or indivisible sides.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    def setup(self):
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.encoder = TinyEncoder(self.latent_channels, self.width, self.encoder_blocks, **types)
        self.decoder = TinyDecoder(self.out_channels, self.width, self.decoder_blocks, **types)

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.encoder_blocks) - 1)

    embed_dim = property(lambda self: self.latent_channels)
    scale_factor = 1.0  # its latents are already scaled

    def moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The latents as mean of a posterior of variance 0."""
        latents = self.encode(x)
        return latents, jnp.full_like(latents, -jnp.inf)

    def encode(self, x: jax.Array) -> jax.Array:
        """Latents, float32, of images (B, H, W, in_channels)."""
        check_channels(x, "TinyAutoencoder with in_channels", self.in_channels)
        check_sides(x, "images", self.downsampling)
        return self.encoder(x).astype(jnp.float32)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images, float32, about [−1, 1], from latents (B, h, w, latent_channels)."""
        check_channels(latents, "TinyAutoencoder with latent_channels", self.latent_channels)
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Reconstruction."""
        return self.decode(self.encode(x))
