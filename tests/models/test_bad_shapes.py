"""Shapes that would fail late, or silently build another network, are refused with a message."""

import jax
import jax.numpy as jnp
import pytest

from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.models.embedders import ClassEmbedder, SpatialRescaler
from ldm_jax.models.text import TextTransformer
from ldm_jax.models.tiny_autoencoder import TinyAutoencoder
from ldm_jax.models.unet import UNet
from ldm_jax.models.vq import VQModel

SMALL = dict(in_channels=4, model_channels=32, channel_mult=(1, 2), attention_resolutions=(2,))
VECTOR = dict(num_classes="sequential", adm_in_channels=6)


def shapes(network, *inputs, **named):
    return jax.eval_shape(network.init, jax.random.key(0), *inputs, **named)


@pytest.mark.parametrize(
    "fields, size, context, message",
    [
        ({}, (8, 8, 7), None, "in_channels=4 got 7"),
        (
            dict(resblock_updown=True),
            (9, 8, 4),
            None,
            r"latents \(9, 8\): sides must be multiples of 2",
        ),
        (dict(context_dim=8), (8, 8, 4), 9, r"context_dim=8 got context=\(1, 3, 9\)"),
        (dict(context_dim=8), (8, 8, 4), None, "context_dim=8 got context=None"),
        ({}, (8, 8, 4), 9, r"context_dim=None got context=\(1, 3, 9\)"),
        (dict(num_heads=5), (8, 8, 4), None, "64 channels do not divide into heads"),
        (dict(num_head_channels=24), (8, 8, 4), None, "64 channels do not divide into heads"),
        (dict(num_head_channels=128), (8, 8, 4), None, "64 channels do not divide into heads"),
        (dict(num_heads=-1), (8, 8, 4), None, r"num_heads=-1, num_head_channels=-1"),
        (
            dict(transformer_depth=(1, 2, 10)),
            (8, 8, 4),
            None,
            r"transformer_depth=\(1, 2, 10\) has 3 entries for 2 levels",
        ),
        (
            dict(disable_self_attentions=(True,)),
            (8, 8, 4),
            None,
            r"disable_self_attentions=\(True,\) has 1 entries for 2 levels",
        ),
        (dict(num_heads=(2,)), (8, 8, 4), None, r"num_heads=\(2,\) has 1 entries for 2 levels"),
        (dict(num_heads=(1, 5)), (8, 8, 4), None, "64 channels do not divide into heads"),
        (dict(channel_mult=(1, 1.3)), (8, 8, 4), None, "42 channels do not divide into 32 groups"),
    ],
)
def test_unet(fields, size, context, message):
    context = None if context is None else jnp.zeros((1, 3, context))
    with pytest.raises(ValueError, match=message):
        shapes(UNet(**SMALL | fields), jnp.zeros((1, *size)), jnp.zeros(1), context)


@pytest.mark.parametrize(
    "fields, y, message",
    [
        (VECTOR, None, r"num_classes='sequential' takes y=\(2, 6\) and got y=None"),
        (VECTOR, jnp.zeros((2, 7)), r"takes y=\(2, 6\) and got y=\(2, 7\)"),
        (VECTOR, jnp.zeros((1, 6)), r"takes y=\(2, 6\) and got y=\(1, 6\)"),
        ({}, jnp.zeros((2, 6)), r"num_classes=None takes y=None and got y=\(2, 6\)"),
        (dict(num_classes=10), None, r"num_classes=10 takes y=\(2,\) and got y=None"),
        (dict(num_classes=10), jnp.zeros((2, 1), int), r"takes y=\(2,\) and got y=\(2, 1\)"),
        (dict(num_classes=10), jnp.zeros(2), "takes integers as y and got float32"),
        (dict(num_classes="continuous"), jnp.zeros(2), r"takes y=\(2, 1\) and got y=\(2,\)"),
        (dict(num_classes="timestep"), jnp.zeros((2, 1)), r"takes y=\(2,\) and got y=\(2, 1\)"),
        (dict(num_classes="sequential"), jnp.zeros((2, 6)), "needs adm_in_channels"),
        (dict(num_classes="vector"), jnp.zeros(2), r"'vector' is no number and none of \['seq"),
    ],
)
def test_what_else_a_unet_is_told(fields, y, message):
    with pytest.raises(ValueError, match=message):
        shapes(UNet(**SMALL, **fields), jnp.zeros((2, 8, 8, 4)), jnp.zeros(2), y=y)


SIDES = r"images \(10, 8\): sides must be multiples of 4 pixels"
NETWORKS = {
    "kl": AutoencoderKL(ch=32, ch_mult=(1, 2), patch_size=2),
    "vq": VQModel(ch=32, ch_mult=(1, 2), patch_size=2, embed_dim=4),
    "tiny": TinyAutoencoder(width=8, encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_autoencoder(name):
    network = NETWORKS[name]
    with pytest.raises(ValueError, match=SIDES):
        shapes(network, jnp.zeros((1, 10, 8, 3)))
    with pytest.raises(ValueError, match="in_channels=3 got 4 channels"):
        shapes(network, jnp.zeros((1, 8, 8, 4)))
    params = shapes(network, jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="(embed_dim|latent_channels)=4 got 16 channels"):
        jax.eval_shape(
            lambda p, z: network.apply(p, z, method="decode"), params, jnp.zeros((1, 2, 2, 16))
        )


def test_autoencoder_without_quant_conv():
    network = AutoencoderKL(z_channels=3, embed_dim=4, use_quant_conv=False)
    with pytest.raises(ValueError, match="embed_dim=4 must equal z_channels=3"):
        shapes(network, jnp.zeros((1, 8, 8, 3)))


def test_text():
    model = TextTransformer(vocab_size=9, width=8, depth=1, heads=1, head_dim=8, max_length=4)
    with pytest.raises(ValueError, match="5 tokens, but max_length is 4"):
        shapes(model, jnp.zeros((1, 5), jnp.int32))


@pytest.mark.parametrize("labels", [jnp.zeros(2), jnp.zeros((2, 1), int)])
def test_classes(labels):
    with pytest.raises(
        ValueError, match=r"takes labels \(B,\), integers, and got (float|int)32\(2"
    ):
        shapes(ClassEmbedder(), labels)


def test_rescaler():
    with pytest.raises(ValueError, match=r"maps \(8, 6\): sides must be multiples of 4 pixels"):
        shapes(SpatialRescaler(n_stages=2), jnp.zeros((1, 8, 6, 3)))


@pytest.mark.parametrize("dim, shape", [(None, (2, 6)), (6, (2, 7)), (6, (1, 6)), (6, (6,))])
def test_an_embedding_of_the_guidance_that_a_unet_does_not_take(dim, shape):
    network = UNet(**SMALL, time_cond_proj_dim=dim)
    given = dict(timestep_cond=jnp.zeros(shape))
    with pytest.raises(ValueError, match=rf"time_cond_proj_dim={dim} got timestep_cond=\("):
        shapes(network, jnp.zeros((2, 8, 8, 4)), jnp.zeros(2), **given)
