"""T2I-Adapter: its maps, where a UNet adds them, and bad input in one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.build import tuples
from ldm_jax.models.t2i_adapter import (
    T2IAdapter,
    feature_places,
    halvings,
    mean_of_four,
    pixel_unshuffle,
)
from ldm_jax.models.unet import UNet
from ldm_jax.published import MODELS

SMALL = dict(model_channels=16, channel_mult=(1, 2), num_res_blocks=1, groups=4)
INSIDE = UNet(**SMALL, attention_resolutions=(1, 2), num_heads=2, context_dim=8)
AFTER = UNet(**SMALL, attention_resolutions=(2,), num_heads=2, context_dim=8)
X, T, CONTEXT = jnp.ones((1, 4, 4, 4)), jnp.ones(1), jnp.ones((1, 3, 8))
FULL = T2IAdapter((16, 32), (1,), num_res_blocks=1, factor=2)
LIGHT = T2IAdapter((16, 32), (1,), num_res_blocks=1, factor=2, light=True)
HINT = np.random.default_rng(1).uniform(size=(1, 8, 8, 3)).astype(np.float32)


def random_params(module, *inputs, **named):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs, **named)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: np.float32(0.1 * rng.standard_normal(s.shape)), shapes)


def test_squares_become_channels():
    """Channel (c·f + y)·f + x, as torch's PixelUnshuffle."""
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    made = pixel_unshuffle(jnp.asarray(x), 2)
    assert made.shape == (2, 2, 3, 12)
    for c, y, column in np.ndindex(3, 2, 2):
        there = x[:, y::2, column::2, c]
        np.testing.assert_array_equal(made[..., (2 * c + y) * 2 + column], there)


def test_an_odd_side_is_rounded_up():
    x = np.arange(9.0, dtype=np.float32).reshape(1, 3, 3, 1)
    np.testing.assert_allclose(mean_of_four(x)[0, ..., 0], [[2.0, 3.5], [6.5, 8.0]])


@pytest.mark.parametrize("adapter", [FULL, LIGHT])
def test_it_starts_without_effect_and_every_map_learns(adapter):
    params = adapter.init(jax.random.key(0), HINT)["params"]
    features = adapter.apply({"params": params}, HINT)
    assert [f.shape for f in features] == [(1, 4, 4, 16), (1, 2, 2, 32)]
    for feature in features:
        np.testing.assert_array_equal(feature, 0.0)

    def loss(params):
        return sum(((f - 1.0) ** 2).mean() for f in adapter.apply({"params": params}, HINT))

    step = jax.jit(lambda p: jax.tree.map(lambda v, g: v - 0.05 * g, p, jax.grad(loss)(p)))
    first = step(params)
    kernel = "body_0_in_conv" if adapter.light else "conv_in"
    assert np.abs(first[kernel]["kernel"]).max() > 1e-4
    grads = jax.grad(loss)(first)
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert np.abs(leaf).max() > 0.0, path


def test_where_maps_are_added():
    """At a level's end: before downsampling if it has attention, and else after it."""
    assert feature_places(INSIDE) == [(16, 1), (32, 2), (32, 2)]
    assert feature_places(AFTER) == [(16, 2), (32, 2), (32, 2)]
    stable, xl = (UNet(**tuples(MODELS[name].unet)) for name in ("sd1", "sdxl-base"))
    assert feature_places(stable) == [(320, 1), (640, 2), (1280, 4), (1280, 8), (1280, 8)]
    assert feature_places(xl) == [(320, 2), (640, 2), (1280, 4), (1280, 4)]
    assert halvings([1, 2, 4, 8]) == (1, 2, 3) and halvings([2, 2, 4, 4]) == (2,)


@pytest.mark.parametrize("unet", [INSIDE, AFTER])
def test_zero_maps_change_no_bit_and_each_other_does(unet):
    params = random_params(unet, X, T, CONTEXT)
    run = jax.jit(lambda f: unet.apply({"params": params}, X, T, CONTEXT, features=f))
    plain = jax.jit(lambda: unet.apply({"params": params}, X, T, CONTEXT))()
    zeros = [jnp.zeros((1, 4 // side, 4 // side, c)) for c, side in feature_places(unet)]
    np.testing.assert_array_equal(run(tuple(zeros)), plain)
    for i in range(3):
        changed = tuple(zeros[:i] + [zeros[i] + 1.0] + zeros[i + 1 :])
        assert np.abs(run(changed) - plain).max() > 1e-3, i
        np.testing.assert_array_equal(unet_prefix(unet, params, changed[: i + 1]), run(changed))


def unet_prefix(unet, params, features):
    """Fewer maps are those of the first levels."""
    return jax.jit(lambda f: unet.apply({"params": params}, X, T, CONTEXT, features=f))(features)


@pytest.mark.parametrize("features, message", [
    ((np.zeros((1, 2, 2, 16)),), "features of 2 × 2 × 16 where the UNet has 4 × 4 × 16: its hint"),
    ((np.zeros((1, 4, 4, 8)),), "features of 4 × 4 × 8 where the UNet has 4 × 4 × 16"),
    (tuple(np.zeros((1, 4 // s, 4 // s, c)) for c, s in [(16, 1), *3 * [(32, 2)]]),
     "UNet takes 2 . 1 features and got 4"),
])  # fmt: skip
def test_maps_that_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        random_params(INSIDE, X, T, CONTEXT, features=features)


@pytest.mark.parametrize("hint, message", [
    (np.zeros((1, 8, 8, 1)), r"T2IAdapter with hint_in=3 got 1 channels"),
    (np.zeros((1, 8, 7, 3)), r"T2I-Adapter's hint \(8, 7\): sides must be multiples of 2 pixels"),
])  # fmt: skip
def test_hints_that_are_refused(hint, message):
    with pytest.raises(ValueError, match=message):
        random_params(FULL, hint)
