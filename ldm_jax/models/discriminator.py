"""PatchGAN discriminator (Isola et al. 2017) as in VQGAN and latent diffusion."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.layers import Conv, Layer


class PatchDiscriminator(nn.Module):
    """Images (B, H, W, 3) in [−1, 1] → one logit per overlapping patch, (B, h, w, 1), float32.

    Batch normalisation always uses the statistics of the current batch: the discriminator exists
    only during training, so no running averages are kept. Convolutions compute in `dtype` (None:
    that of the images), the statistics in float32.
    """

    ndf: int = 64
    n_layers: int = 3
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normal = nn.initializers.normal(0.02)

        def conv(x, features, stride, name, use_bias=True):
            options = dict(use_bias=use_bias, kernel_init=normal, name=name, dtype=self.dtype)
            return Conv(features, (4, 4), stride, 1, **options)(x)

        h = nn.leaky_relu(conv(x, self.ndf, 2, "conv_0"), 0.2)
        for i in range(1, self.n_layers + 1):
            stride = 2 if i < self.n_layers else 1
            h = conv(h, self.ndf * min(2**i, 8), stride, f"conv_{i}", use_bias=False)
            h = nn.leaky_relu(BatchNorm(name=f"norm_{i}")(h), 0.2)
        return conv(h, 1, 1, "conv_out").astype(jnp.float32)


class BatchNorm(Layer):
    """Batch normalisation over (B, H, W, C) by the batch's own statistics, ε = 1e-5."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def around_one(key, shape):
            return 1.0 + 0.02 * jax.random.normal(key, shape)

        scale = self.param("scale", around_one, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        h = x.astype(jnp.float32)
        centred = h - jnp.mean(h, axis=(0, 1, 2))
        variance = jnp.mean(jnp.square(centred), axis=(0, 1, 2))
        return (centred * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(x.dtype)
