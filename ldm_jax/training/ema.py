"""Exponential moving averages of parameters.

The average that training evaluates and exports has a constant decay with the warm-up of the
originals. Others can be tracked beside it: of other constant decays, and power-function averages,
from which `post_hoc` makes those of other widths (Karras et al. 2024, arXiv 2312.02696, §3).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# A power function of exponent 0, the plain mean of all steps, has the greatest width.
WIDEST = 12**-0.5


def ema_decay_at(step: jax.Array, decay: float) -> jax.Array:
    """min(decay, (1 + n)/(10 + n)), n = step + 1 counted from the first update (LDM, `LitEma`)."""
    n = step.astype(jnp.float32) + 1.0
    return jnp.minimum(decay, (1.0 + n) / (10.0 + n))


@dataclasses.dataclass(frozen=True)
class Constant:
    """An average of a constant decay, with the warm-up of `ema_decay_at`."""

    decay: float

    @property
    def name(self) -> str:
        return f"decay_{self.decay:g}"

    def weight(self, step: jax.Array) -> jax.Array:
        """The weight of the parameters after update `step`, counted from 0."""
        return 1.0 - ema_decay_at(step, self.decay)


@dataclasses.dataclass(frozen=True)
class Power:
    """An average with weights τ^γ, where τ is the number of updates, and γ follows from the width.

    `sigma_rel` is the standard deviation of the weights, as a part of the training's length (eq. 3
    of Karras et al. 2024). The decay is (1 − 1/n)^(γ+1) at update n, counted from 1 (eq. 4).
    """

    sigma_rel: float

    @property
    def name(self) -> str:
        return f"sigma_rel_{self.sigma_rel:g}"

    def weight(self, step: jax.Array) -> jax.Array:
        """The weight of the parameters after update `step`, counted from 0."""
        n = step.astype(jnp.float32) + 1.0
        exponent = power_exponent(self.sigma_rel) + 1.0
        # 1 − (1 − 1/n)^(γ+1) loses its digits at large n.
        return -jnp.expm1(exponent * jnp.log1p(-1.0 / n))


def more_averages(settings: Any) -> tuple[Constant | Power, ...]:
    """The averages of `train.ema_decays` and `train.ema_sigma_rel`, beside `train.ema_decay`.

    Raises:
      ValueError: a decay or width out of its range, or twice the same.
    """
    decays, widths = (tuple(settings.get(key, ())) for key in ("ema_decays", "ema_sigma_rel"))
    for decay in decays:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"train.ema_decays: {decay} is not in 0 ≤ decay < 1")
    for width in widths:
        check_width("train.ema_sigma_rel", width)
    if len(widths) == 1:
        raise ValueError(
            f"train.ema_sigma_rel={widths}: averages of other widths are made from two, such as "
            "(0.05, 0.1)"
        )
    made = (*map(Constant, decays), *map(Power, widths))
    if len({average.name for average in made}) < len(made):
        raise ValueError(f"train.ema_decays={decays} and ema_sigma_rel={widths}: one stands twice")
    return made


def check_width(name: str, sigma_rel: float) -> None:
    """Raises ValueError if no power function has this width; `name` is that of the setting."""
    if not 0.0 < sigma_rel < WIDEST:
        raise ValueError(f"{name}={sigma_rel:g}: choose a width between 0 and {WIDEST:.4f}")


def power_exponent(sigma_rel: float) -> float:
    """γ of σ_rel² = (γ + 1)/((γ + 2)²(γ + 3)), by the roots of that cubic."""
    inverse = float(sigma_rel) ** -2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def update_ema(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """ema − (1 − d)(ema − params), d = `ema_decay_at(step, decay)`."""
    return move(ema, params, Constant(decay).weight(step))


def move(average: Any, params: Any, weight: jax.Array) -> Any:
    """average − weight·(average − params)."""
    return jax.tree.map(lambda e, p: e - weight * (e - p), average, params)


def post_hoc(snapshots: list[tuple[float, int]], sigma_rel: float, step: int) -> np.ndarray:
    """The factors of snapshots whose sum is nearest to the average of width `sigma_rel` at `step`.

    Nearest in the least squares of the weights τ ↦ p(τ) of the parameters after update τ, which
    stand for those of the sum. Unlike in the paper, the factors add up to 1, so what did not move
    in training stays as it is. A power function at T is p(τ) = (γ + 1)·τ^γ/T^(γ+1) up to T and 0
    after it.

    Args:
      snapshots: (sigma_rel, step) of each.
    """
    matrix, goal, _ = _products(snapshots, sigma_rel, step)
    # Of equal scale: narrow averages at early steps have the largest products. The last row and
    # column are the condition on the sum, with its Lagrange multiplier.
    scale = np.sqrt(np.diag(matrix))
    system = np.block(
        [[matrix / np.outer(scale, scale), 1.0 / scale[:, None]], [1.0 / scale, np.zeros(1)]]
    )
    solution = np.linalg.lstsq(system, np.append(goal / scale, 1.0), rcond=1e-14)[0]
    return solution[:-1] / scale


def unlike(
    snapshots: list[tuple[float, int]], factors: np.ndarray, sigma_rel: float, step: int
) -> float:
    """‖Σ factorᵢ·pᵢ − p‖/‖p‖ of the weights p of the average that `post_hoc` approximates."""
    matrix, goal, own = _products(snapshots, sigma_rel, step)
    squared = factors @ matrix @ factors - 2.0 * factors @ goal + own
    return float(np.sqrt(max(squared, 0.0) / own))


def _products(
    snapshots: list[tuple[float, int]], sigma_rel: float, step: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Products of the snapshots' weights with each other, with the goal's, and the goal's own."""
    widths, steps = (np.array(column, np.float64) for column in zip(*snapshots, strict=True))
    exponents = np.array([power_exponent(width) for width in widths])
    goal = power_exponent(sigma_rel), float(step)
    return (
        _product(exponents[:, None], steps[:, None], exponents, steps),
        _product(exponents, steps, *goal),
        float(_product(*goal, *goal)),
    )


def _product(a: Any, step_a: Any, b: Any, step_b: Any) -> np.ndarray:
    """∫ p_a(τ)·p_b(τ) dτ of two power functions, each by its exponent and step."""
    end = np.minimum(step_a, step_b)
    shared = (end / step_a) ** (a + 1.0) * (end / step_b) ** (b + 1.0)
    return (a + 1.0) * (b + 1.0) / (a + b + 1.0) * shared / end
