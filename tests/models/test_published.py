"""The released networks can be said in our fields, and have the released sizes."""

import jax.numpy as jnp
import pytest

from ldm_jax.models.unet import UNet
from tests.models.published import AUTOENCODERS, UNETS

SIZES = {}  # of networks, many of which were released more than once


@pytest.fixture
def size_once(size):
    def size_once(module, *inputs, **named):
        key = repr(module)
        if key not in SIZES:
            SIZES[key] = size(module, *inputs, **named)
        return SIZES[key]

    return size_once


@pytest.mark.parametrize("name", UNETS)
def test_unet(name, size_once):
    fields, millions, tensors = UNETS[name]
    network = UNet(**fields)
    width, kind = network.context_dim, network.num_classes
    context = None if width is None else jnp.zeros((1, 1, width))
    labels = {None: None, "sequential": jnp.zeros((1, network.adm_in_channels or 0))}
    y = labels.get(kind, jnp.zeros(1, int))
    side = 2 ** len(network.channel_mult)
    x = jnp.zeros((1, side, side, network.in_channels))
    found = size_once(network, x, jnp.zeros(1), context, y=y)
    assert found == (pytest.approx(millions, abs=0.0051), tensors)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder(name, size_once):
    kind, fields, millions, tensors = AUTOENCODERS[name]
    found = size_once(kind(**fields), jnp.zeros((1, 64, 64, 3)))
    assert found == (pytest.approx(millions, abs=0.0051), tensors)
