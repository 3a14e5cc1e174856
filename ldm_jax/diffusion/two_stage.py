"""Samplers that evaluate the network more than once per step.

Notation as in `ldm_jax.diffusion.multistep`. A step that ends on clean latents has no level for a
second evaluation, and is an Euler step.
"""

import jax
import numpy as np

from ldm_jax.diffusion.grids import Grid
from ldm_jax.diffusion.multistep import (
    History,
    Table,
    add_churn,
    first_order,
    needs_signal,
)
from ldm_jax.diffusion.parameterization import Denoiser
from ldm_jax.diffusion.schedule import Level, Schedule


def heun(
    schedule: Schedule,
    grid: Grid,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = np.inf,
    churn_scale: float = 1.0,
) -> Table:
    """Heun's method for dy/ds = ε, y = x/α (Karras et al. 2022, algorithms 1 and 2)."""
    here, after = needs_signal("heun", grid)
    raised, table = add_churn(schedule, here, churn, churn_min, churn_max, churn_scale)
    half = after.alpha * (after.ratio - raised.ratio) / 2.0
    return table | _heun(raised, after, after.alpha / raised.alpha, half, 0.0)


def flow_heun(schedule: Schedule, grid: Grid) -> Table:
    """Heun's method for du/dτ = ε − x0 with u = x/(α + σ) and τ = σ/(α + σ).

    On a flow schedule that is x and t; on others a change of variables that stays finite where no
    signal is left.
    """
    here, after = grid
    scale, scale_after = here.alpha + here.sigma, after.alpha + after.sigma
    half = scale_after * (after.sigma / scale_after - here.sigma / scale) / 2.0
    return _heun(here, after, scale_after / scale, half, 1.0)


def _heun(here: Level, after: Level, keep: np.ndarray, half: np.ndarray, x0_slope: float) -> Table:
    a, b = first_order(here, after, after.sigma)
    return {
        "level": here,
        "after": after,
        "euler": np.stack([a, b], axis=1),
        "keep": keep,
        "half": half,
        "x0_slope": np.full(len(a), x0_slope),
        "second": after.sigma > 0.0,
    }


def heun_step(x, history: History, c, denoise: Denoiser, noise):
    """An Euler step, then one with the mean of the slopes at both ends."""
    if "churn" in c:
        x = c["churn_x"] * x + c["churn"] * noise
    x0, eps = denoise(x, c["level"])
    ahead = c["euler"][0] * x + c["euler"][1] * x0

    def corrected():
        x0_ahead, eps_ahead = denoise(ahead, c["after"])
        slopes = eps + eps_ahead - c["x0_slope"] * (x0 + x0_ahead)
        return c["keep"] * x + c["half"] * slopes

    return jax.lax.cond(c["second"], corrected, lambda: ahead), history


def dpmpp_2s_ancestral(schedule: Schedule, grid: Grid, eta: float = 1.0) -> Table:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1, r = ½) down to s_down, then noise up to s'.

    The second evaluation is at the level half-way in λ, s_mid = √(s·s_down).
    """
    here, after = grid
    with np.errstate(divide="ignore"):
        shrink = after.ratio / here.ratio
    up = np.minimum(after.ratio, eta * after.ratio * np.sqrt(1.0 - shrink**2))
    down = np.sqrt(after.ratio**2 - up**2)
    second = (down > 0.0) & np.isfinite(here.ratio)
    ratio = np.where(second, here.ratio, 1.0)
    middle = schedule.from_ratio(np.sqrt(ratio * np.where(second, down, 1.0)))
    middle = Level(*(np.where(second, m, h) for m, h in zip(middle, here, strict=True)))
    half_a, half_b = first_order(here, middle, middle.sigma)
    a, b = first_order(here, after, after.alpha * down)
    return {
        "level": here,
        "middle": middle,
        "half": np.stack([half_a, half_b], axis=1),
        "whole": np.stack([a, b], axis=1),
        "noise": after.alpha * up,
        "second": second,
    }


def dpmpp_2s_step(x, history: History, c, denoise: Denoiser, noise):
    """Half a step, whose end gives the x0 of the whole step; then fresh noise."""
    x0 = denoise(x, c["level"]).x0

    def midpoint():
        return denoise(c["half"][0] * x + c["half"][1] * x0, c["middle"]).x0

    x0 = jax.lax.cond(c["second"], midpoint, lambda: x0)
    return c["whole"][0] * x + c["whole"][1] * x0 + c["noise"] * noise, history


def ddim_inverse(schedule: Schedule, grid: Grid) -> Table:
    """DDIM from clean latents to noise (Song et al. 2021, §4.3), on the grid of DDIM reversed."""
    after, here = grid.rows(np.s_[::-1])
    a = after.alpha / here.alpha
    return {"level": after, "x": a, "b": after.sigma - here.sigma * a}


def ddim_inverse_step(refinements: int):
    """The step whose DDIM step leads back to x: x' = a·x + b·ε(x', t').

    ε is first evaluated at x, where other implementations stop; each refinement evaluates it again
    at the current x'. The fixed point inverts DDIM exactly.
    """

    def step(x, history: History, c, denoise: Denoiser, noise):
        del noise
        ahead = x
        for _ in range(1 + refinements):
            ahead = c["x"] * x + c["b"] * denoise(ahead, c["level"]).eps
        return ahead, history

    return step
