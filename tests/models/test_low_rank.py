"""A layer with factors beside its kernel computes what a layer with the changed kernel does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ldm_jax.models.attention import GatedDense
from ldm_jax.models.layers import conv
from ldm_jax.models.low_rank import DOWN, MAGNITUDE, SCALE, UP, adding_factors, norms

RANK = 3
LAYERS = {
    "a matrix": (nn.Dense(7), (2, 5, 6)),
    "a matrix without biases": (nn.Dense(7, use_bias=False), (2, 6)),
    "a gated matrix": (GatedDense(5), (2, 4, 6)),
    "a convolution": (conv(7, 3), (2, 6, 4, 6)),
    "a convolution that halves": (conv(7, 3, stride=2, padding=((0, 1), (0, 1))), (2, 6, 4, 6)),
    "a convolution of single pixels": (conv(7, 1), (2, 6, 4, 6)),
}


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def changed(params, kind):
    """The kernel of the formula, without any of the package's functions."""
    moved = params["kernel"] + params[SCALE] * jnp.einsum(
        "...ir,ro->...io", params[DOWN], params[UP]
    )
    if kind == "lora":
        return moved
    lengths = jnp.linalg.norm(moved.reshape(-1, moved.shape[-1]), axis=0)
    return params[MAGNITUDE] * moved / jax.lax.stop_gradient(lengths)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("what", LAYERS)
def test_output_and_gradient_are_those_of_the_changed_kernel(what, kind):
    (layer, shape), rng = LAYERS[what], np.random.default_rng(0)
    x = normal(rng, *shape)
    params = layer.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: normal(rng, *leaf.shape), params)
    *inputs, outputs = params["kernel"].shape
    factors = {DOWN: normal(rng, *inputs, RANK), UP: normal(rng, RANK, outputs)}
    if kind == "dora":
        factors[MAGNITUDE] = 1.0 + 0.3 * normal(rng, outputs)
    params |= {SCALE: np.float32(0.4)}

    def measured(out):
        out = jnp.concatenate(out, axis=-1) if isinstance(out, tuple) else out
        return jnp.mean(jnp.sin(out)), out

    def ours(factors):
        with adding_factors():
            return measured(layer.apply({"params": params | factors}, x))

    def formula(factors):
        kernel = changed(params | factors, kind)
        return measured(layer.apply({"params": params | {"kernel": kernel}}, x))

    with jax.default_matmul_precision("highest"):
        (_, found), grads = jax.value_and_grad(ours, has_aux=True)(factors)
        (_, expected), wanted = jax.value_and_grad(formula, has_aux=True)(factors)
        without = measured(layer.apply({"params": params}, x))[1]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(found - without).max() > 0.1
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.abs(grad).max() > 1e-4


def test_only_within_the_block():
    layer, x = nn.Dense(4), jnp.ones((1, 3))
    params = layer.init(jax.random.key(0), x)["params"]
    factors = {DOWN: jnp.ones((3, 1)), UP: jnp.ones((1, 4)), SCALE: jnp.float32(1.0)}
    plain = layer.apply({"params": params}, x)
    with adding_factors():
        inside = layer.apply({"params": params | factors}, x)
    np.testing.assert_array_equal(inside, plain + 3.0)
    np.testing.assert_array_equal(layer.apply({"params": params | factors}, x), plain)


def test_half_precision_stays():
    layer, x = nn.Dense(4, dtype=jnp.bfloat16), jnp.ones((1, 3))
    params = layer.init(jax.random.key(0), x)["params"]
    params |= {DOWN: jnp.ones((3, 1)), UP: jnp.ones((1, 4)), SCALE: jnp.float32(1.0)}
    with adding_factors():
        for more in ({}, {MAGNITUDE: norms(params["kernel"])}):
            assert layer.apply({"params": params | more}, x).dtype == jnp.bfloat16
