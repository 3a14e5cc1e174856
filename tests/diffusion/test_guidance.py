"""Guidance against its formulas, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.guidance import (
    autoguidance,
    classifier_free,
    dynamic_threshold,
    optimally_scaled,
    projected,
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


def draws(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 2, 4, 4, 3))


def test_cfg_zero_star():
    """The published formula, per example, with the products written out."""
    uncond, cond = draws(2)
    found = optimally_scaled(*(jnp.asarray(a) for a in (uncond, cond - uncond)), 3.0)
    for row in range(2):
        u, c = uncond[row], cond[row]
        s = (c * u).sum() / ((u**2).sum() + 1e-8)
        np.testing.assert_allclose(found[row], u * s + 3.0 * (c - u * s), atol=1e-5)


@pytest.mark.parametrize("norm", [np.inf, 2.0])
@pytest.mark.parametrize("parallel", [0.0, 0.5, 1.0])
def test_projected_guidance(parallel, norm):
    """Algorithm 1 of the paper, in float64, on x0 = shift + factor·output."""
    uncond, cond, shift = draws(3)
    factor = -0.7
    combine = projected(jnp.asarray(shift), factor, parallel, norm)
    found = combine(jnp.asarray(uncond), jnp.asarray(cond - uncond), 3.0)
    for row in range(2):
        u, c = (shift[row] + factor * v[row] for v in (uncond, cond))
        away = c - u
        away = away * min(1.0, norm / np.linalg.norm(away))
        unit = c / np.linalg.norm(c)
        along = (away * unit).sum() * unit
        guided = c + 2.0 * (away - along + parallel * along)
        np.testing.assert_allclose(found[row], (guided - shift[row]) / factor, atol=1e-5)


def test_projected_guidance_with_all_of_it_is_classifier_free():
    uncond, cond, shift = (jnp.asarray(a) for a in draws(3))
    found = projected(shift, 0.4, 1.0, np.inf)(uncond, cond - uncond, 3.0)
    np.testing.assert_allclose(found, uncond + 3.0 * (cond - uncond), atol=2e-5)
