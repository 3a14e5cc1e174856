"""Small networks, and a function, that turn conditions other than text into a UNet's inputs."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.layers import Embed, average_pool, check_sides, conv, timestep_embedding


class ClassEmbedder(nn.Module):
    """Labels (B,), integers in [0, n_classes) → a context of one token (B, 1, embed_dim).

    For LDM's class-conditional models; a null class, if there is one, is a further class.
    """

    n_classes: int = 1000
    embed_dim: int = 512
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, labels: jax.Array) -> jax.Array:
        if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"ClassEmbedder takes labels (B,), integers, and got {labels.dtype}{labels.shape}"
            )
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        normal = nn.initializers.normal(1.0)
        embed = Embed(
            self.n_classes, self.embed_dim, embedding_init=normal, name="embedding", **types
        )
        return embed(labels[:, None])


class SpatialRescaler(nn.Module):
    """Maps (B, H, W, C) halved `n_stages` times, then, with `out_channels`, mixed by a 1×1 matrix.

    It scales a segmentation to the size of the latents (LDM, §4.3.2). torch's bilinear ×½ without
    antialiasing, which LDM uses, samples midway between pixels 2i and 2i + 1: it is their mean.

    Raises ValueError for sides that cannot be halved so often.
    """

    n_stages: int = 1
    out_channels: int | None = None
    use_bias: bool = False
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @property
    def factor(self) -> int:
        """The input is so many times as high and wide as the output."""
        return 2**self.n_stages

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        check_sides(x, "maps", self.factor)
        for _ in range(self.n_stages):
            x = average_pool(x)
        if self.out_channels is None:
            return x
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        # A one-hot class gets a code of unit variance, as large as the latents it is beside.
        mapper = conv(
            self.out_channels,
            1,
            use_bias=self.use_bias,
            kernel_init=nn.initializers.normal(1.0),
            name="channel_mapper",
            **types,
        )
        return mapper(x)


class Patches(nn.Module):
    """Maps (B, H, W, C) → (B, H/size, W/size, out_channels): a matrix on each patch of pixels.

    It brings a map that is larger than the latents to their size without loss.

    Raises ValueError for sides that are no multiples of `size`.
    """

    size: int = 2
    out_channels: int = 12
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @property
    def factor(self) -> int:
        """The input is so many times as high and wide as the output."""
        return self.size

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        check_sides(x, "maps", self.size)
        batch, height, width, channels = x.shape
        x = x.reshape(
            batch, height // self.size, self.size, width // self.size, self.size, channels
        )
        x = x.swapaxes(2, 3).reshape(batch, height // self.size, width // self.size, -1)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        # Pixels in [−1, 1] vary by half a unit or less, and become as large as latents.
        init = nn.initializers.orthogonal(2.0)
        return conv(self.out_channels, 1, kernel_init=init, name="mapper", **types)(x)


def guidance_embedding(guidance: jax.Array, dim: int = 256) -> jax.Array:
    """Guidance scales (B,) → (B, dim), the `timestep_cond` of distilled UNets.

    Sines, then cosines, of 1000·(guidance − 1): Luo et al. 2023 (LCM), whose ω is guidance − 1.
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - 1))
    angles = 1000.0 * (guidance.astype(jnp.float32) - 1.0)[:, None] * frequencies
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def concat_timestep_embedding(values: jax.Array, dim: int = 256) -> jax.Array:
    """Numbers (B, N) → their sinusoids side by side (B, N·dim): SGM's ConcatTimestepEmbedderND.

    SDXL's sizes, crops and scores are embedded like this. (B,) counts as (B, 1).
    """
    values = values.reshape(values.shape[0], -1)
    return timestep_embedding(values.reshape(-1), dim).reshape(values.shape[0], -1)
