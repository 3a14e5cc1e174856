"""The problem both sides solve: the same exact denoiser, the same start, the same noise.

Every element of x0 comes from a mixture of two Gaussians, whose E[x0 | x] is known. A network here
is that answer in a parameterisation, as a function of x and its input time, written once for
jax.numpy and torch: a sampler that passes a wrong time fails.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import torch
from ldm.models.diffusion.ddpm import LatentDiffusion

from ldm_jax.diffusion.grids import Grid, sampling_grid
from ldm_jax.diffusion.multistep import Table
from ldm_jax.diffusion.parameterization import make_denoiser
from ldm_jax.diffusion.samplers import Sampler, get_sampler, make_table, sample
from ldm_jax.diffusion.schedule import DiscreteSchedule, Level, Schedule, make_schedule

STEPS = (5, 10, 25, 50)
SHAPE = (3, 4, 4, 4)
SD = {"start": 0.00085, "end": 0.012}  # β of the Stable Diffusion family
SCHEDULE = make_schedule("linear", **SD)

KEYS = jax.random.split(jax.random.key(7), SHAPE[0])
STDS, MEANS, LOG_ODDS = (0.4, 0.3), (-0.6, 0.5), 0.4


def denoised(x, alpha, sigma, xp):
    """E[x0 | x] at the level (alpha, sigma), which broadcasts against x."""
    means, logs = [], []
    for mean, std in zip(MEANS, STDS, strict=True):
        variance = (alpha * std) ** 2 + sigma**2
        away = x - alpha * mean
        means.append(mean + alpha * std**2 * away / variance)
        logs.append(-0.5 * away**2 / variance - 0.5 * xp.log(variance))
    share = 1.0 / (1.0 + xp.exp(logs[0] - logs[1] - LOG_ODDS))
    return means[0] + share * (means[1] - means[0])


def answer(kind: str, x, alpha, sigma, xp):
    """`denoised` as a network that predicts `kind` would say it."""
    x0 = denoised(x, alpha, sigma, xp)
    eps = (x - alpha * x0) / sigma
    return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[kind]


def level_of(schedule: Schedule, t, like, xp):
    """(α, σ) of times (B,), shaped for `like`; on a table, lines of atan σ/α between entries."""
    t = t.reshape(-1, *(1,) * (like.ndim - 1))
    if not isinstance(schedule, DiscreteSchedule):
        return 1.0 - t / schedule.timesteps, t / schedule.timesteps
    table = xp.asarray(np.arctan2(schedule.sigma, schedule.alpha), dtype=like.dtype)
    low = xp.floor(t)
    entry = xp.asarray(low, dtype=xp.int32)
    here, above = table[entry], table[xp.clip(entry + 1, max=schedule.timesteps - 1)]
    angle = here + (t - low) * (above - here)
    return xp.cos(angle), xp.sin(angle)


@functools.cache
def network(kind: str, schedule: Schedule, xp) -> Callable:
    """`network(x, t)`, t (B,) or a number, in jax.numpy or torch."""

    def call(x, t):
        t = xp.asarray(t, dtype=x.dtype).reshape(-1)
        return answer(kind, x, *level_of(schedule, t, x, xp), xp)

    return call


@functools.cache
def denoiser(kind: str, schedule: Schedule) -> Callable:
    """Ours, of that network."""
    return make_denoiser(kind, network(kind, schedule, jax.numpy), 0.5)


def levels_of(schedule: Schedule, steps: int, spacing: str, shift: float = 1.0) -> Level:
    """The S + 1 levels of a spacing, each step from one to the next; CompVis' end as they do."""
    family = "ddim" if spacing in ("compat", "quad") else "plain"
    return sampling_grid(schedule, steps, spacing, family=family, shift=shift).levels


def start(dtype: np.dtype) -> np.ndarray:
    """Unit Gaussian noise."""
    return np.asarray(jax.random.normal(jax.random.key(3), SHAPE, dtype))


@functools.cache
def _draws(steps: int, dtype: np.dtype) -> list[torch.Tensor]:
    def draw(key, i):
        return jax.random.normal(jax.random.fold_in(key, i), SHAPE[1:], dtype)

    every = jax.jit(jax.vmap(jax.vmap(draw, (0, None)), (None, 0)))(KEYS, np.arange(steps))
    return [torch.tensor(np.asarray(noise)) for noise in every]


def noises(steps: int, dtype: np.dtype) -> list[torch.Tensor]:
    """What our sampler draws at each step."""
    return _draws(50 if steps <= 50 else steps, dtype)[:steps]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(sampler, denoise, x, table):
    return sample(sampler, denoise, x, table, KEYS)


def ours(
    sampler: str | Sampler,
    schedule: Schedule,
    levels: Level | Grid,
    x: np.ndarray,
    kind: str = "eps",
    denoise: Callable | None = None,
    **options: float,
) -> np.ndarray:
    """Our sampler's latents from x, with the network of `kind` or another denoiser."""
    grid = levels if isinstance(levels, Grid) else Grid.chain(levels)
    if isinstance(sampler, str):
        table = make_table(sampler, schedule, grid, **options)
        sampler = get_sampler(sampler)
    else:
        table = sampler.coefficients(schedule, grid)
    return finish(sampler, table, x, denoise or denoiser(kind, schedule))


def finish(sampler: Sampler, table: Table, x: np.ndarray, denoise: Callable) -> np.ndarray:
    """The latents at the end of a table."""
    table = jax.tree.map(lambda v: v.astype(x.dtype) if v.dtype == np.float64 else v, table)
    # Samplers that share a step share its program.
    sampler = dataclasses.replace(sampler, coefficients=None)
    result = np.asarray(_run(sampler, denoise, x, table))
    assert result.dtype == x.dtype
    return result


def compvis(kind: str = "eps", start=SD["start"], end=SD["end"], **options) -> LatentDiffusion:
    """CompVis' model around a network of ours; `apply_model` may be replaced."""
    model = LatentDiffusion(
        first_stage_config={"target": "torch.nn.Identity"},
        cond_stage_config="__is_unconditional__",
        unet_config={"target": "torch.nn.Identity"},
        timesteps=1000,
        use_ema=False,
        parameterization=kind,
        linear_start=start,
        linear_end=end,
        **options,
    )
    predict = network(kind, SCHEDULE, torch)
    model.apply_model = lambda x, t, cond, **kwargs: predict(x, t)
    return model
