"""Distributions with a known denoiser, to test every sampler.

Every element of the latents is independent, from a mixture of two Gaussians. In one dimension the
probability-flow ODE keeps quantiles, so its exact solution is a map of distribution functions.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

from ldm_jax.diffusion.parameterization import Prediction, make_denoiser, target

WEIGHTS = np.array([0.3, 0.7])
MEANS = np.array([-0.9, 0.6])
STDS = np.array([0.35, 0.25])
MEAN = float(WEIGHTS @ MEANS)
STD = float(np.sqrt(WEIGHTS @ (STDS**2 + MEANS**2) - MEAN**2))


def mixture(x, level) -> Prediction:
    """E[x0 | x] and E[ε | x] for the mixture."""
    x_, alpha, sigma = (jnp.asarray(v)[..., None] for v in (x, level.alpha, level.sigma))
    variance = (alpha * STDS) ** 2 + sigma**2
    logits = -0.5 * (x_ - alpha * MEANS) ** 2 / variance - 0.5 * jnp.log(variance)
    share = jax.nn.softmax(logits + np.log(WEIGHTS), axis=-1)
    each = MEANS + alpha * STDS**2 * (x_ - alpha * MEANS) / variance
    x0 = jnp.sum(share * each, axis=-1)
    noise = jnp.sum(share * sigma * (x_ - alpha * MEANS) / variance, axis=-1)
    return Prediction(x0, noise)


def as_network(exact, kind: str):
    """The exact denoiser by way of a network that predicts `kind`."""

    def denoise(x, level) -> Prediction:
        def network(inputs, t):
            return target(kind, *exact(x, level), level, 0.5)

        return make_denoiser(kind, network, 0.5)(x, level)

    return denoise


def distribution(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """P(x_t ≤ x)."""
    deviation = np.sqrt((alpha * STDS) ** 2 + sigma**2)
    return ndtr((x[..., None] - alpha * MEANS) / deviation) @ WEIGHTS


def exact_map(x: np.ndarray, start, end) -> np.ndarray:
    """Where the probability-flow ODE takes x, from level `start` to `end` (each (α, σ))."""
    goal = distribution(x, *start)
    low, high = np.full(x.shape, -20.0), np.full(x.shape, 20.0)
    for _ in range(100):  # bisection
        middle = (low + high) / 2
        below = distribution(middle, *end) < goal
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2
