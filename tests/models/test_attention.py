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
)
from ldm_jax.models.dot_product import AT_A_TIME, attend, forward_derivatives
from ldm_jax.runtime.hlo import COLLECTIVES
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


def plain(query, key, value):
    """The definition, which keeps all weights."""
    logits = jnp.einsum("blhd,bshd->bhls", query, key) / np.sqrt(query.shape[-1])
    return jnp.einsum("bhls,bshd->blhd", jax.nn.softmax(logits, axis=-1), value)


def inputs(queries, keys, heads, width, batch=2):
    draw = np.random.default_rng(0).normal
    shapes = ((batch, n, heads, width) for n in (queries, keys, keys, queries))
    return [jnp.asarray(draw(size=shape), jnp.float32) for shape in shapes]


def whiles(function, *arrays):
    """The number of loops in the compiled program."""
    return jax.jit(function).lower(*arrays).compile().as_text().count(" while(")


@pytest.mark.parametrize(
    "shape, limit, loops",
    [
        ((16, 24, 4, 8), 2**20, 0),  # all at a time
        ((16, 24, 4, 8), 2 * 4 * 2 * 16 * 24, 1),  # two heads at a time
        ((128, 24, 1, 8), 4 * 2 * 64 * 24, 1),  # half of the queries
        ((128, 24, 2, 8), 4 * 2 * 64 * 24, 2),  # both
        ((97, 24, 1, 8), 1, 0),  # a prime number of queries has no parts
    ],
)
def test_value_and_gradient_whatever_is_computed_at_a_time(shape, limit, loops, monkeypatch):
    monkeypatch.setitem(AT_A_TIME, "cpu", limit)
    *arrays, weight = inputs(*shape)

    def loss(attention):
        return lambda *arrays: jnp.sum(weight * attention(*arrays))

    np.testing.assert_allclose(attend(*arrays), plain(*arrays), atol=2e-6)
    found = jax.jit(jax.grad(loss(attend), (0, 1, 2)))(*arrays)
    expected = jax.grad(loss(plain), (0, 1, 2))(*arrays)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)
    assert whiles(lambda *arrays: attend(*arrays), *arrays) == loops


def test_gradients_keep_the_type_of_the_inputs():
    *arrays, weight = (a.astype(jnp.bfloat16) for a in inputs(16, 24, 4, 8))
    found = jax.grad(lambda *a: jnp.sum(weight * attend(*a)), (0, 1, 2))(*arrays)
    exact = [a.astype(jnp.float32) for a in arrays]
    expected = jax.grad(lambda *a: jnp.sum(weight * plain(*a)), (0, 1, 2))(*exact)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.05)


def test_a_training_step_keeps_no_weights():
    """The memory of the gradient grows by the parts' weights, not by all of them."""
    *arrays, _ = inputs(1024, 1024, 8, 8, batch=8)
    weights = 4 * 8 * 8 * 1024 * 1024

    def temporaries(attention):
        gradient = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(attention(*a))), (0, 1, 2)))
        return gradient.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(attend) < weights / 4 < weights < temporaries(plain)


@pytest.mark.parametrize("sizes", [(8, 1), (2, 4)])
def test_a_mesh_gathers_nothing(monkeypatch, sizes):
    """The batch is never cut, and of the heads each device has its share of every part, so devices
    that hold rows of the batch and heads send each other nothing."""
    monkeypatch.setitem(AT_A_TIME, "cpu", 1)
    mesh = jax.make_mesh(sizes, ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "tensor"))
    *arrays, _ = (jax.device_put(a, place) for a in inputs(128, 24, 8, 8, batch=8))
    gradient = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(attend(*a))), (0, 1, 2)))
    with jax.set_mesh(mesh):
        program = gradient.lower(*arrays).compile().as_text()
    assert program.count("while(") >= 2
    assert not any(kind in program for kind in COLLECTIVES[1:])


@pytest.mark.parametrize("limit", [2**20, 4 * 2 * 64 * 24])
def test_forward_derivatives(limit, monkeypatch):
    """Value, gradient and jvp, and the gradient through a jvp, are those of the definition."""
    monkeypatch.setitem(AT_A_TIME, "cpu", limit)
    *arrays, weight = inputs(128, 24, 2, 8)
    tangents = tuple(jnp.sin(3.0 * a) for a in arrays)

    def derivatives(attention):
        def value_and_tangent(*arrays):
            return jax.jvp(attention, tuple(arrays), tangents)

        def both(*arrays):
            value, tangent = value_and_tangent(*arrays)
            return jnp.sum(weight * value) + jnp.sum(weight * tangent)

        def loss(*arrays):
            return jnp.sum(weight * attention(*arrays))

        gradients = (jax.grad(f, (0, 1, 2))(*arrays) for f in (loss, both))
        return *value_and_tangent(*arrays), *gradients

    with forward_derivatives():
        found = jax.jit(lambda: derivatives(attend))()
    expected = derivatives(plain)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_forward_derivatives_end_with_their_context():
    """What would be a wrong gradient is an error; after an exception too."""
    *arrays, _ = inputs(16, 24, 4, 8)
    with pytest.raises(ZeroDivisionError), forward_derivatives():
        raise ZeroDivisionError
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(attend, arrays, arrays)


def test_with_forward_derivatives_a_training_step_keeps_no_weights():
    *arrays, _ = inputs(1024, 1024, 8, 8, batch=8)
    weights = 4 * 8 * 8 * 1024 * 1024
    with forward_derivatives():
        gradient = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(attend(*a))), (0, 1, 2)))
        memory = gradient.lower(*arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < weights / 4
