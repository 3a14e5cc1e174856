"""The first stage with a codebook (van den Oord et al. 2017; Esser et al. 2021; LDM, §3.1).

Latent diffusion uses the latents *before* quantisation, and quantisation is the decoder's first
step. In CompVis' code that is `VQModelInterface`; here `VQModel` always does this.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.autoencoder import depth_to_space, encoder_and_decoder
from ldm_jax.models.layers import Embed, check_channels, conv


class Quantized(NamedTuple):
    """The quantisation of latents (B, h, w, C).

    Attributes:
      latents: (B, h, w, C), each the nearest entry; gradients pass unchanged to the input
        (straight-through).
      indices: (B, h, w), of the entries.
      loss: mean squared difference of latents and entries, with a term for the gradient of each.
      perplexity: exp of the entropy of the entries' frequencies in the batch, 1 … n_embed.
      usage: number of different entries in the batch.
    """

    latents: jax.Array
    indices: jax.Array
    loss: jax.Array
    perplexity: jax.Array
    usage: jax.Array


class VectorQuantizer(nn.Module):
    """Latents (B, h, w, embed_dim) → the nearest of `n_embed` learned entries; see `Quantized`.

    The loss is ‖sg[e] − z‖² + β‖e − sg[z]‖² with `legacy`, as LDM's weights were trained (by
    taming-transformers' `VectorQuantizer2`), and otherwise with β on the first term, the
    commitment, as in van den Oord et al. (eq. 3). Its value is the same in both cases.

    Raises ValueError for latents of another width.
    """

    n_embed: int
    embed_dim: int
    beta: float = 0.25
    legacy: bool = True
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array) -> Quantized:
        def around_zero(key, shape, dtype):
            bound = 1.0 / self.n_embed
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        check_channels(z, "VectorQuantizer with embed_dim", self.embed_dim)
        codebook = Embed(
            self.n_embed,
            self.embed_dim,
            jnp.float32,
            self.param_dtype,
            embedding_init=around_zero,
            name="embedding",
        )
        z = z.astype(jnp.float32)

        # ‖z − e‖² without ‖z‖², which is the same for all entries. In full precision: otherwise
        # accelerators multiply in bfloat16, and choose another entry.
        table = codebook.embedding.astype(jnp.float32)
        products = jnp.einsum("bhwd,nd->bhwn", z, table, precision="highest")
        indices = jnp.argmin(jnp.sum(jnp.square(table), axis=-1) - 2.0 * products, axis=-1)
        entries = codebook(indices)

        sg = jax.lax.stop_gradient
        commitment = jnp.mean(jnp.square(sg(entries) - z))
        attraction = jnp.mean(jnp.square(entries - sg(z)))
        weights = (1.0, self.beta) if self.legacy else (self.beta, 1.0)
        counts = jnp.bincount(indices.reshape(-1), length=self.n_embed)
        frequencies = counts / indices.size
        return Quantized(
            latents=z + sg(entries - z),
            indices=indices,
            loss=weights[0] * commitment + weights[1] * attraction,
            perplexity=jnp.exp(-jnp.sum(frequencies * jnp.log(frequencies + 1e-10))),
            usage=jnp.sum(counts > 0),
        )


def revival_loss(table: jax.Array, z: jax.Array, indices: jax.Array) -> jax.Array:
    """Draws entries that a batch does not use towards latents of it, so that none stays unused.

    Σ ‖e − sg[z_r]‖² / (n_embed · D) over these entries, each with the latent z_r that is nearest to
    a point beside the entry, as far as latents are from their mean, in a direction of its own that
    stays. An entry so moves to the same kind of latent in every step (Zheng & Vedaldi 2023, whose
    nearest latents these are), and entries that start together move apart. A random latent in each
    step would draw all of them to the mean of latents.

    Args:
      table: the codebook (n_embed, D).
      z: latents (B, h, w, D).
      indices: (B, h, w), of the entries that the batch uses.
    """
    unused = jnp.bincount(indices.reshape(-1), length=len(table)) == 0
    latents = jax.lax.stop_gradient(z.reshape(-1, z.shape[-1]))
    direction = jax.random.normal(jax.random.key(0), table.shape)
    points = jax.lax.stop_gradient(table) + jnp.std(latents, axis=0) * direction
    distances = jnp.sum(jnp.square(latents), axis=-1) - 2.0 * points @ latents.T
    nearest = latents[jnp.argmin(distances, axis=-1)]
    return jnp.mean(jnp.square(table - nearest) * unused[:, None])


class VQModel(nn.Module):
    """VQ autoencoder. Outside it, latents are those before quantisation, times `scale_factor`.

    Fields as in `AutoencoderKL`, and those of `VectorQuantizer`. Training calls `prequant`,
    `nearest`, `features` and `last_layer` in this order; `nearest` returns the loss.

    Raises ValueError for pictures or latents of other channels or indivisible sides.
    """

    ch: int = 128
    ch_mult: tuple[float, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = ()
    resolution: int = 256
    in_channels: int = 3
    out_ch: int = 3
    z_channels: int = 3
    embed_dim: int = 3
    n_embed: int = 8192
    beta: float = 0.25
    legacy: bool = True
    mid_attn: bool = True
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
        self.encoder, self.decoder = encoder_and_decoder(self, self.z_channels)
        self.conv_out = conv(self.out_ch * self.patch_size**2, **types)
        self.quant_conv = conv(self.embed_dim, 1, **types)
        self.post_quant_conv = conv(self.z_channels, 1, **types)
        codebook = dict(beta=self.beta, legacy=self.legacy, param_dtype=self.param_dtype)
        self.quantize = VectorQuantizer(self.n_embed, self.embed_dim, **codebook)

    @property
    def downsampling(self) -> int:
        return self.patch_size * 2 ** (len(self.ch_mult) - 1)

    def prequant(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Unscaled latents before quantisation, float32: (B, H, W, C) → (B, H/f, W/f, D)."""
        check_channels(x, "VQModel with in_channels", self.in_channels)
        return self.quant_conv(self.encoder(x, deterministic)).astype(jnp.float32)

    def moments(self, x: jax.Array, deterministic: bool = True) -> tuple[jax.Array, jax.Array]:
        """`prequant` as mean of a posterior of variance 0, and its log-variance."""
        z = self.prequant(x, deterministic)
        return z, jnp.full_like(z, -jnp.inf)

    def nearest(self, z: jax.Array) -> Quantized:
        """The codebook's entries for *unscaled* latents z (B, h, w, embed_dim)."""
        return self.quantize(z)

    def encode(self, x: jax.Array) -> jax.Array:
        """Scaled latents before quantisation: (B, H, W, C) → (B, H/f, W/f, embed_dim)."""
        return self.prequant(x) * self.scale_factor

    def decode(self, latents: jax.Array, force_not_quantize: bool = False) -> jax.Array:
        """Images (B, H, W, C), about [−1, 1], from scaled latents, which are quantised first."""
        z = latents / self.scale_factor
        z = z if force_not_quantize else self.quantize(z).latents
        return self.last_layer(self.features(z))

    def features(self, z: jax.Array, deterministic: bool = True) -> jax.Array:
        """The last convolution's input (B, H, W, ch) for *unscaled, quantised* latents z."""
        check_channels(z, "VQModel with embed_dim", self.embed_dim)
        return self.decoder(self.post_quant_conv(z), deterministic)

    def last_layer(self, features: jax.Array) -> jax.Array:
        """The last convolution; separate, because its gradient weights LDM's adversarial loss."""
        return depth_to_space(self.conv_out(features), self.patch_size).astype(jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Reconstruction through the nearest entries."""
        return self.decode(self.encode(x))
