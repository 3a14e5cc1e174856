"""Shapes that would fail late, or quietly build another network, are refused in plain words."""

import jax
import jax.numpy as jnp
import pytest

from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.models.text import TextTransformer
from ldm_jax.models.unet import UNet

SMALL = dict(in_channels=4, model_channels=32, channel_mult=(1, 2), attention_resolutions=(2,))


def shapes(network, *inputs):
    return jax.eval_shape(network.init, jax.random.key(0), *inputs)


@pytest.mark.parametrize(
    "fields, size, context, message",
    [
        ({}, (8, 8, 7), None, "in_channels=4 got 7"),
        ({}, (9, 8, 4), None, r"latents \(9, 8\): sides must be multiples of 2"),
        (dict(context_dim=8), (8, 8, 4), 9, r"context_dim=8 got context=\(1, 3, 9\)"),
        (dict(context_dim=8), (8, 8, 4), None, "context_dim=8 got context=None"),
        ({}, (8, 8, 4), 9, r"context_dim=None got context=\(1, 3, 9\)"),
        (dict(num_heads=5), (8, 8, 4), None, "64 channels do not divide into heads"),
        (dict(num_head_channels=24), (8, 8, 4), None, "64 channels do not divide into heads"),
    ],
)
def test_unet(fields, size, context, message):
    context = None if context is None else jnp.zeros((1, 3, context))
    with pytest.raises(ValueError, match=message):
        shapes(UNet(**SMALL | fields), jnp.zeros((1, *size)), jnp.zeros(1), context)


def test_autoencoder():
    model = AutoencoderKL(ch=32, ch_mult=(1, 2), patch_size=2)
    with pytest.raises(ValueError, match=r"images \(10, 8\): sides must be multiples of 4 pixels"):
        shapes(model, jnp.zeros((1, 10, 8, 3)))


def test_text():
    model = TextTransformer(vocab_size=9, width=8, depth=1, heads=1, head_dim=8, max_length=4)
    with pytest.raises(ValueError, match="5 tokens, but max_length is 4"):
        shapes(model, jnp.zeros((1, 5), jnp.int32))
