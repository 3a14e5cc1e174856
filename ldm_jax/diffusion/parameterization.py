"""The inputs and outputs of a network, and their conversion to (x0, ε), in one table.

At a level x = α·x0 + σ·ε a network predicts, by kind,

    eps    the noise ε (Ho et al. 2020)
    x0     the clean latents
    v      α·ε − σ·x0, for α² + σ² = 1 (Salimans & Ho 2022, §D)
    flow   the velocity ε − x0 of a straight path (Liu et al. 2023; Esser et al. 2024)
    meanflow  the mean of the flow's velocity over times r … t, t − r being a further input of the
           network (Geng et al. 2025); with t − r = 0 as flow
    edm    F with x0 = c_skip·x/α + c_out·F(c_in·x/α, ln(σ/α)/4) (Karras et al. 2022, table 1)

where σ_data, `sigma_data`, is the latents' standard deviation; no other kind uses it. Every kind is
affine: x0 = A·x + B·output. With x = α·x0 + σ·ε this determines ε, the training target, and the
factor between an error of x0 and an error of the output.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.schedule import Level

KINDS = ("eps", "x0", "v", "flow", "edm", "meanflow")
VELOCITIES = ("flow", "meanflow")

Network = Callable[[jax.Array, jax.Array], jax.Array]
Denoiser = Callable[[jax.Array, Level], "Prediction"]


class Prediction(NamedTuple):
    """A denoiser's prediction for x_t: the clean latents and the noise, each shaped like x_t."""

    x0: jax.Array
    eps: jax.Array


def x0_coefficients(kind: str, level: Level, sigma_data: float) -> tuple[jax.Array, jax.Array]:
    """(A, B) of x0 = A·x + B·output."""
    _, alpha, sigma = level
    if kind == "eps":
        return 1.0 / alpha, -sigma / alpha
    if kind == "x0":
        return jnp.zeros_like(alpha), jnp.ones_like(alpha)
    if kind == "v":
        return alpha, -sigma
    if kind in VELOCITIES:
        return 1.0 / (alpha + sigma), -sigma / (alpha + sigma)
    if kind == "edm":
        total = sigma**2 + (alpha * sigma_data) ** 2
        return alpha * sigma_data**2 / total, sigma * sigma_data / jnp.sqrt(total)
    raise ValueError(f"parameterization {kind!r}: choose one of {', '.join(KINDS)}")


def to_prediction(
    kind: str, output: jax.Array, x: jax.Array, level: Level, sigma_data: float
) -> Prediction:
    """(x0, ε) of a network's output; the level's arrays broadcast against x.

    At a level without signal "eps" does not determine x0, and at one without noise "x0" does not
    determine ε: both divide by zero there.
    """
    _, alpha, sigma = level
    a, b = x0_coefficients(kind, level, sigma_data)
    x0 = a * x + b * output
    if kind == "eps":
        return Prediction(x0, output)
    if kind == "v":
        return Prediction(x0, sigma * x + alpha * output)
    if kind in VELOCITIES:
        return Prediction(x0, x0 + output)
    return Prediction(x0, (x - alpha * x0) / sigma)


def target(kind: str, x0: jax.Array, eps: jax.Array, level: Level, sigma_data: float) -> jax.Array:
    """The training target of the output, the inverse of `to_prediction`."""
    _, alpha, sigma = level
    if kind == "eps":
        return eps
    if kind == "v":
        return alpha * eps - sigma * x0
    if kind in VELOCITIES:
        return eps - x0
    a, b = x0_coefficients(kind, level, sigma_data)
    return (x0 - a * (alpha * x0 + sigma * eps)) / b


def network_inputs(
    kind: str, x: jax.Array, level: Level, sigma_data: float
) -> tuple[jax.Array, jax.Array]:
    """The network's inputs (x, t): unchanged or, for "edm", c_in·x/α and ln(σ/α)/4."""
    if kind != "edm":
        return x, level.t
    scaled = x / jnp.sqrt(level.sigma**2 + (level.alpha * sigma_data) ** 2)
    return scaled, jnp.log(level.sigma / level.alpha) / 4.0


def make_denoiser(kind: str, network: Network, sigma_data: float) -> Denoiser:
    """`denoise(x, level) -> Prediction` from `network(x, t)`, x (B, …) and t (B,).

    The level is scalar, the same for the whole batch, as in samplers.
    """

    def denoise(x: jax.Array, level: Level) -> Prediction:
        inputs, t = network_inputs(kind, x, level, sigma_data)
        output = network(inputs, jnp.broadcast_to(t, x.shape[:1])).astype(x.dtype)
        return to_prediction(kind, output, x, level, sigma_data)

    return denoise
