"""Normalisation, convolution and their initial values."""

import ast
import json
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import layers
from ldm_jax.models.layers import (
    Conv,
    Dense,
    Embed,
    GroupNorm,
    LayerNorm,
    conv,
    level_widths,
    upsample,
    width_multiples,
)
from tests.conftest import ROOT


def test_group_norm_is_the_formula():
    draw = np.random.default_rng(0).normal
    # A mean of 100 deviations costs the one-pass variance E[x²] − E[x]² its digits.
    x = (100.0 + draw(size=(2, 3, 5, 12))).astype(np.float32)
    scale, bias = draw(size=12).astype(np.float32), draw(size=12).astype(np.float32)
    grouped = x.astype(np.float64).reshape(2, 15, 4, 3)
    mean, variance = (f(grouped, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    normal = ((grouped - mean) / np.sqrt(variance + 0.1)).reshape(x.shape)
    found = GroupNorm(4, 0.1).apply({"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(found, normal * scale + bias, atol=5e-5)


def test_group_norm_statistics_in_float32():
    """bfloat16 has nothing between 20 and 20.125, which is an eighth of the deviation."""
    x = jnp.asarray(20 + np.random.default_rng(0).normal(size=(1, 8, 8, 4)), jnp.bfloat16)
    y, variables = GroupNorm(2).init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16 and variables["params"]["scale"].dtype == jnp.float32
    grouped = np.asarray(x, np.float64).reshape(1, 64, 2, 2)
    normal = (grouped - grouped.mean((1, 3), keepdims=True)) / grouped.std((1, 3), keepdims=True)
    np.testing.assert_allclose(y.astype(jnp.float32), normal.reshape(x.shape), rtol=4e-3, atol=1e-3)


def test_group_norm_refuses_indivisible_channels():
    with pytest.raises(ValueError, match="48 channels do not divide into 32 groups"):
        jax.eval_shape(GroupNorm(32).init, jax.random.key(0), jnp.zeros((1, 2, 2, 48)))


def test_convolution_keeps_size_and_starts_as_in_torch():
    """U(±1/√fan_in): torch's `kaiming_uniform_(a=√5)`."""
    x = jnp.ones((1, 6, 7, 20))
    y, variables = conv(16).init_with_output(jax.random.key(0), x)
    assert y.shape == (1, 6, 7, 16)
    kernel = np.asarray(variables["params"]["kernel"])
    bound = 1 / np.sqrt(9 * 20)
    assert 0.98 * bound < np.abs(kernel).max() <= bound
    assert abs(kernel.std() / (bound / np.sqrt(3)) - 1) < 0.03
    zero = conv(16, zero_init=True).init(jax.random.key(0), x)["params"]
    assert not np.any(zero["kernel"]) and not np.any(zero["bias"])


@pytest.mark.parametrize("fewest", [1, 10**9])
@pytest.mark.parametrize("options", [{}, dict(use_bias=False)])
def test_a_convolution_of_an_upsampled_picture(fewest, options, monkeypatch):
    """Value and gradients, with the sums of taps and without."""
    monkeypatch.setattr(layers, "FEWEST_PIXELS", fewest)
    draw = np.random.default_rng(0).normal
    x = jnp.asarray(draw(size=(2, 5, 4, 3)), jnp.float32)
    weight = jnp.asarray(draw(size=(2, 10, 8, 6)), jnp.float32)
    plain, own = conv(6, **options), conv(6, upsampled=True, **options)
    params = plain.init(jax.random.key(0), x)
    like = jax.eval_shape(own.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, params)

    def both(layer, resize):
        def loss(params, x):
            y = layer.apply(params, resize(x))
            return jnp.sum(weight * y), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    found, expected = both(own, lambda x: x), both(plain, upsample)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_widths_that_are_no_multiples_of_the_first():
    for base in (1, 3, 64, 224, 320):
        widths = range(base, 9 * base + 40)
        multiples = width_multiples(widths)
        assert level_widths(base, multiples) == tuple(widths)
        assert json.loads(json.dumps(multiples)) == multiples
    assert repr(width_multiples([64, 128, 96])) == "[1, 2, 1.5]"


LAYERS = {
    "Dense": (Dense(3), jnp.zeros((2, 4)), "kernel"),
    "Conv": (Conv(3, (1, 1)), jnp.zeros((1, 2, 2, 4)), "kernel"),
    "LayerNorm": (LayerNorm(), jnp.zeros((2, 4)), "scale"),
    "GroupNorm": (GroupNorm(2), jnp.zeros((1, 2, 2, 4)), "bias"),
    "Embed": (Embed(5, 4), jnp.zeros(2, int), "embedding"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_parameter_of_another_shape_is_named(name):
    layer, x, changed = LAYERS[name]
    params = layer.init(jax.random.key(0), x)["params"]
    assert layer.apply({"params": params}, x).shape[:1] == x.shape[:1]
    params = params | {changed: jnp.zeros((*params[changed].shape[:-1], 7))}
    with pytest.raises(flax.errors.ScopeParamShapeError, match=f'"{changed}"'):
        layer.apply({"params": params}, x)


def test_every_network_declares_its_parameters_so():
    """With Flax's own layers a network is traced in twice to three times the time."""
    for path in sorted((ROOT / "ldm_jax" / "models").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert not re.fullmatch(r"nn\.(Dense|Conv|LayerNorm|Embed)", ast.unparse(node.func))
            if isinstance(node, ast.ClassDef) and "self.param(" in ast.unparse(node):
                bases = [ast.unparse(base) for base in node.bases]
                assert "Layer" in bases or node.name == "Layer", (path, node.name)
