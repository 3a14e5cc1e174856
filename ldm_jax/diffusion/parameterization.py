"""What a network predicts, and its conversion to (x0, ε): one table for every use.

With x_t = α·x0 + σ·ε and α² + σ² = 1: "eps" predicts ε (Ho et al. 2020), "x0" the clean latents,
"v" the velocity α·ε − σ·x0 (Salimans & Ho 2022, §D).
"""

from typing import NamedTuple

import jax


class Prediction(NamedTuple):
    """A denoiser's belief about x_t: the clean latents and the noise, each shaped like x_t."""

    x0: jax.Array
    eps: jax.Array


def to_prediction(
    kind: str, output: jax.Array, x_t: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> Prediction:
    """(x0, ε) of a network's output. `alpha` and `sigma` broadcast against x_t."""
    if kind == "eps":
        return Prediction((x_t - sigma * output) / alpha, output)
    if kind == "x0":
        return Prediction(output, (x_t - alpha * output) / sigma)
    if kind == "v":
        return Prediction(alpha * x_t - sigma * output, sigma * x_t + alpha * output)
    raise ValueError(f"parameterization {kind!r}: choose eps, x0 or v")


def target(
    kind: str, x0: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> jax.Array:
    """What the network should have said, the inverse of `to_prediction`."""
    if kind == "eps":
        return eps
    if kind == "x0":
        return x0
    if kind == "v":
        return alpha * eps - sigma * x0
    raise ValueError(f"parameterization {kind!r}: choose eps, x0 or v")
