"""Every parameterisation is one affine view of the same (x0, ε)."""

import jax
import numpy as np
import pytest

from ldm_jax.diffusion.guidance import classifier_free
from ldm_jax.diffusion.parameterization import target, to_prediction

X0, EPS = (np.asarray(jax.random.normal(jax.random.key(i), (2, 4, 4, 3))) for i in (0, 1))


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("alpha", [0.1, 0.7, 0.99])
def test_the_true_answer_converts_to_the_true_prediction(kind, alpha):
    sigma = np.sqrt(1 - alpha**2)
    x_t = alpha * X0 + sigma * EPS
    prediction = to_prediction(kind, target(kind, X0, EPS, alpha, sigma), x_t, alpha, sigma)
    np.testing.assert_allclose(prediction.x0, X0, atol=2e-5)
    np.testing.assert_allclose(prediction.eps, EPS, atol=2e-5)


def test_velocity_is_alpha_eps_minus_sigma_x0():
    np.testing.assert_allclose(target("v", X0, EPS, 0.6, 0.8), 0.6 * EPS - 0.8 * X0, rtol=1e-6)


@pytest.mark.parametrize("function", [to_prediction, target])
def test_unknown_parameterization_lists_the_known(function):
    with pytest.raises(ValueError, match="'score': choose eps, x0 or v"):
        function("score", X0, EPS, 0.6, 0.8)


def network(x, t, condition):
    return x * condition[:, None, None, None] + t[:, None, None, None]


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_guidance_is_the_same_in_every_parameterization(kind):
    """Guiding a network's output and guiding the x0 it means commute."""
    alpha, sigma, scale = 0.6, 0.8, 3.0
    cond, uncond = 1.5 * X0, 0.5 * EPS
    guided = uncond + scale * (cond - uncond)
    a = to_prediction(kind, guided, X0, alpha, sigma).x0
    b, c = (to_prediction(kind, out, X0, alpha, sigma).x0 for out in (cond, uncond))
    np.testing.assert_allclose(a, c + scale * (b - c), atol=1e-4)


@pytest.mark.parametrize("scale, expected", [(1.0, 2.0), (0.0, -1.0), (4.0, 11.0)])
def test_guidance_scale_one_is_conditional_and_zero_unconditional(scale, expected):
    condition, null = np.full(2, 2.0), np.full(2, -1.0)
    guided = classifier_free(network, condition, null, scale)(X0, np.zeros(2))
    np.testing.assert_allclose(guided, expected * X0, rtol=1e-5)
