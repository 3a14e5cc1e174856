"""Attention and transformer blocks against the originals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.attention import (
    Attention,
    FeedForward,
    SpatialSelfAttention,
    SpatialTransformer,
    attend,
)
from tests.models.torch_layout import AUTOENCODER, UNET

BLOCKS = {
    "cross_attention": (Attention(heads=4, head_dim=8), UNET),
    "feed_forward": (FeedForward(gated=True), UNET),
    "spatial_transformer": (SpatialTransformer(heads=4, head_dim=16, depth=2), UNET),
    "cross_attention_only": (
        SpatialTransformer(heads=4, head_dim=8, disable_self_attn=True),
        UNET,
    ),
    "autoencoder_attention": (SpatialSelfAttention(), AUTOENCODER),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_agrees_with_original(name, agrees):
    block, rules = BLOCKS[name]

    def init(x, **others):
        return block.init(jax.random.key(0), x, **others)["params"]

    def apply(params, x, **others):
        return {"y": block.apply({"params": params}, x, **others)}

    agrees(f"block_{name}", rules, init, apply, tolerance=1e-5)


def test_attend_is_softmax_of_scaled_products():
    draw = np.random.default_rng(0).normal
    query, key, value = draw(size=(2, 5, 3, 4)), draw(size=(2, 7, 3, 4)), draw(size=(2, 7, 3, 4))
    scores = np.einsum("blhd,bshd->bhls", query, key) / np.sqrt(4)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhls,bshd->blhd", weights, value)
    found = attend(*(jnp.asarray(a, jnp.float32) for a in (query, key, value)))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_softmax_in_float32():
    """Logits √d·(256, 257) / √d are one number in bfloat16, and their softmax would be (½, ½)."""
    query = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    key = jnp.array([[256, 256, 0, 0], [256, 256, 1, 1]], jnp.bfloat16).reshape(1, 2, 1, 4)
    value = jnp.array([0, 1], jnp.bfloat16).reshape(1, 2, 1, 1).repeat(4, axis=-1)
    found = attend(query, key, value)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), 1 / (1 + np.exp(-1)), rtol=0.01)
