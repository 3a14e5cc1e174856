"""Every parameterisation is one affine view of the same (x0, ε)."""

import jax
import numpy as np
import pytest

from ldm_jax.diffusion.parameterization import (
    KINDS,
    make_denoiser,
    network_inputs,
    target,
    to_prediction,
    x0_coefficients,
)
from ldm_jax.diffusion.schedule import Level

X0, EPS = (np.asarray(jax.random.normal(jax.random.key(i), (2, 4, 4, 3))) for i in (0, 1))
PRESERVING = [Level(0.0, a, np.sqrt(1 - a**2)) for a in (0.1, 0.7, 0.99)]
OTHERS = [Level(300.0, 0.7, 0.3), Level(5.0, 1.0, 5.0)]  # flow and EDM


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", PRESERVING + OTHERS)
def test_the_true_answer_converts_to_the_true_prediction(kind, level):
    if kind == "v" and level in OTHERS:
        pytest.skip("v is defined for α² + σ² = 1")
    x = level.alpha * X0 + level.sigma * EPS
    prediction = to_prediction(kind, target(kind, X0, EPS, level, 0.5), x, level, 0.5)
    np.testing.assert_allclose(prediction.x0, X0, atol=1e-4)
    np.testing.assert_allclose(prediction.eps, EPS, atol=1e-4)


def test_targets_are_those_of_their_papers():
    level = Level(0.0, 0.6, 0.8)
    np.testing.assert_allclose(target("v", X0, EPS, level, 0.5), 0.6 * EPS - 0.8 * X0, rtol=1e-6)
    np.testing.assert_array_equal(target("flow", X0, EPS, level, 0.5), EPS - X0)
    np.testing.assert_array_equal(target("eps", X0, EPS, level, 0.5), EPS)
    np.testing.assert_allclose(target("x0", X0, EPS, level, 0.5), X0, atol=1e-6)


def test_edm_has_karras_coefficients():
    """Table 1 of the paper at σ = 2, σ_data = 0.5."""
    level = Level(2.0, 1.0, 2.0)
    skip, out = x0_coefficients("edm", level, 0.5)
    assert skip == pytest.approx(0.25 / 4.25)
    assert out == pytest.approx(2.0 * 0.5 / 4.25**0.5)
    scaled, noise = network_inputs("edm", X0, level, 0.5)
    np.testing.assert_allclose(scaled, X0 / 4.25**0.5, rtol=1e-6)
    assert noise == pytest.approx(np.log(2.0) / 4)


@pytest.mark.parametrize("sigma", [0.01, 1.0, 50.0])
def test_edm_targets_have_unit_variance_for_data_of_its_own_spread(sigma):
    level = Level(sigma, 1.0, sigma)
    x0 = 0.5 * jax.random.normal(jax.random.key(3), (100_000,))
    eps = jax.random.normal(jax.random.key(4), (100_000,))
    assert np.std(target("edm", x0, eps, level, 0.5)) == pytest.approx(1.0, abs=0.01)
    inputs, _ = network_inputs("edm", x0 + sigma * eps, level, 0.5)
    assert np.std(inputs) == pytest.approx(1.0, abs=0.01)


def test_edm_of_scaled_latents_is_edm():
    """Only the ratio σ/α counts: a variance-preserving level tells the network the same."""
    at_one, scaled = Level(0.0, 1.0, 0.75), Level(0.0, 0.8, 0.6)
    pairs = ((X0, at_one), (0.8 * X0, scaled))
    for a, b in zip(*(network_inputs("edm", x, level, 0.5) for x, level in pairs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(
        to_prediction("edm", EPS, X0, at_one, 0.5).x0,
        to_prediction("edm", EPS, 0.8 * X0, scaled, 0.5).x0,
        rtol=1e-5,
    )


def test_a_denoiser_tells_the_network_one_time_per_example():
    seen = []

    def network(x, t):
        seen.append(t)
        return x

    make_denoiser("eps", network, 0.5)(X0, Level(np.float32(7.0), np.float32(0.6), np.float32(0.8)))
    np.testing.assert_array_equal(seen[0], [7.0, 7.0])


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_is_the_same_in_every_parameterization(kind):
    """Guiding a network's output and guiding the x0 it means commute."""
    level, scale = PRESERVING[1], 3.0
    cond, uncond = 1.5 * X0, 0.5 * EPS
    a = to_prediction(kind, uncond + scale * (cond - uncond), X0, level, 0.5).x0
    b, c = (to_prediction(kind, out, X0, level, 0.5).x0 for out in (cond, uncond))
    np.testing.assert_allclose(a, c + scale * (b - c), atol=1e-4)


def test_unknown_parameterization_lists_the_known():
    with pytest.raises(ValueError, match="'score': choose one of eps, x0, v, flow, edm, meanflow"):
        to_prediction("score", X0, EPS, PRESERVING[0], 0.5)
    with pytest.raises(ValueError, match="'score': choose one of eps, x0, v, flow, edm, meanflow"):
        target("score", X0, EPS, PRESERVING[0], 0.5)
