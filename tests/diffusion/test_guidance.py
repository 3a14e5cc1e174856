"""Guidance against its formulas, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.guidance import (
    autoguidance,
    classifier_free,
    dynamic_threshold,
    rescaled,
    where_guided,
)
from ldm_jax.diffusion.parameterization import Prediction
from ldm_jax.diffusion.schedule import Level

X = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
T = jnp.zeros(2)
NULL, CAT, HAT = (jnp.full(2, value) for value in (-1.0, 2.0, 5.0))


def network(x, t, condition):
    return x * condition[:, None, None, None] + t[:, None, None, None]


@pytest.mark.parametrize("scale, expected", [(1.0, 2.0), (0.0, -1.0), (4.0, 11.0)])
def test_scale_one_is_conditional_and_zero_unconditional(scale, expected):
    guided = classifier_free(network, [CAT], NULL, scale)(X, T)
    np.testing.assert_allclose(guided, expected * X, rtol=1e-5)


def test_several_conditions_add_up_by_weight():
    """−1 + 3·(0.5·(2 + 1) + 2·(5 + 1)) = 39.5."""
    guided = classifier_free(network, [CAT, HAT], NULL, 3.0, jnp.array([0.5, 2.0]))(X, T)
    np.testing.assert_allclose(guided, 39.5 * X, rtol=1e-5)


def test_autoguidance_leads_away_from_the_weak_model():
    guided = autoguidance(lambda x, t: 2.0 * x, lambda x, t: 1.5 * x, 3.0)(X, T)
    np.testing.assert_allclose(guided, 3.0 * X, rtol=1e-6)


def test_rescale_gives_the_conditional_spread_back():
    guided = 4.0 * X + 0.5
    whole = rescaled(guided, X, 1.0)
    np.testing.assert_allclose(np.std(whole, (1, 2, 3)), np.std(X, (1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(rescaled(guided, X, 0.7), 0.7 * whole + 0.3 * guided, rtol=1e-5)
    np.testing.assert_array_equal(rescaled(guided, X, 0.0), guided)


def test_outside_the_interval_only_one_network_runs():
    calls = []

    def network(name):
        def run(x, t):
            jax.debug.callback(lambda: calls.append(name))
            return x

        return run

    step = jax.jit(lambda active: where_guided(network("both"), network("one"), active)(X, T))
    for active in (True, False, False):
        step(active)
    jax.effects_barrier()
    assert calls == ["both", "one", "one"]


def test_dynamic_threshold_clips_to_the_percentile_and_keeps_x():
    values = jnp.arange(1.0, 101.0).reshape(1, 10, 10, 1) / 20.0  # up to 5
    level = Level(0.0, 0.6, 0.8)

    def denoise(x, level):
        return Prediction(values, (x - level.alpha * values) / level.sigma)

    x = jnp.ones((1, 10, 10, 1))
    x0, eps = dynamic_threshold(denoise, 0.5)(x, level)
    s = np.quantile(values, 0.5)
    np.testing.assert_allclose(x0, np.minimum(values, s) / s, rtol=1e-5)
    np.testing.assert_allclose(level.alpha * x0 + level.sigma * eps, x, rtol=1e-5)
    untouched, _ = dynamic_threshold(denoise, 0.5, limit=10.0)(x, level)
    np.testing.assert_allclose(untouched, values, rtol=1e-6)
