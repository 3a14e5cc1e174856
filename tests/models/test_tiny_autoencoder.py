"""The tiny autoencoder against diffusers' AutoencoderTiny."""

import jax
import jax.numpy as jnp

from ldm_jax.models.tiny_autoencoder import TinyAutoencoder
from tests.models.torch_layout import TINY_AUTOENCODER


def test_agrees_with_original(agrees):
    network = TinyAutoencoder(width=8, encoder_blocks=(1, 2, 1), decoder_blocks=(2, 1, 1))

    def apply(params, x, z):
        latents = network.apply({"params": params}, x, method="encode")
        image = network.apply({"params": params}, z, method="decode")
        return {"latents": latents, "image": image}

    agrees(
        "autoencoder_tiny",
        TINY_AUTOENCODER,
        init=lambda x, z: network.init(jax.random.key(0), x)["params"],
        apply=apply,
        tolerance=5e-5,
    )


def test_shapes():
    network, image = (
        TinyAutoencoder(latent_channels=16, dtype=jnp.bfloat16),
        jnp.zeros((2, 16, 8, 3)),
    )
    params = jax.eval_shape(network.init, jax.random.key(0), image)
    latents = jax.eval_shape(lambda p, x: network.apply(p, x, method="encode"), params, image)
    assert network.downsampling == 8
    assert (latents.shape, latents.dtype) == ((2, 2, 1, 16), jnp.float32)
    result = jax.eval_shape(network.apply, params, image)
    assert (result.shape, result.dtype) == (image.shape, jnp.float32)
