"""Noise schedules, and the timesteps that a sampler visits.

The forward process is x_t = α_t·x0 + σ_t·ε with α_t = √ᾱ_t, σ_t = √(1 − ᾱ_t) and ᾱ_t = Π(1 − β_s)
(Ho et al. 2020, eq. 4), t = 0…T−1. Tables are float64 on the host and cast once, when used.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Schedule:
    """ᾱ_t for t = 0…T−1, float64."""

    alphas_cumprod: np.ndarray

    @property
    def timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def alpha(self) -> np.ndarray:
        """α_t = √ᾱ_t."""
        return np.sqrt(self.alphas_cumprod)

    @property
    def sigma(self) -> np.ndarray:
        """σ_t = √(1 − ᾱ_t)."""
        return np.sqrt(1.0 - self.alphas_cumprod)


def make_schedule(
    name: str = "linear", timesteps: int = 1000, start: float = 1e-4, end: float = 2e-2
) -> Schedule:
    """A schedule by the name LDM's configurations use; `start` and `end` bound β.

    "linear" is the square of a line between √start and √end, which other libraries call
    "scaled_linear"; "sqrt_linear" is the plain line; "cosine" (Nichol & Dhariwal 2021, eq. 17)
    takes neither bound.
    """
    if name == "linear":
        betas = np.linspace(start**0.5, end**0.5, timesteps) ** 2
    elif name == "sqrt_linear":
        betas = np.linspace(start, end, timesteps)
    elif name == "cosine":
        s = 8e-3
        f = np.cos((np.arange(timesteps + 1) / timesteps + s) / (1 + s) * np.pi / 2) ** 2
        betas = np.clip(1.0 - f[1:] / f[:-1], 0.0, 0.999)
    else:
        raise ValueError(f"schedule {name!r}: choose linear, sqrt_linear or cosine")
    return Schedule(np.cumprod(1.0 - betas))


def sampling_timesteps(timesteps: int, steps: int, spacing: str) -> np.ndarray:
    """The `steps` timesteps a sampler visits, from noisy to clean, int64 in [0, timesteps).

    "trailing" starts at the last timestep (Lin et al. 2023), "leading" ends at the first but one,
    "linspace" takes both ends. "compat" is LDM's own grid: a multiple of T // S, plus one, which
    has more than `steps` entries for some counts and leaves the table for others.

    Raises:
      ValueError: steps outside 1…T, an unknown spacing, or a count that "compat" cannot do.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps={steps}: this model takes 1 to {timesteps} steps")
    if spacing == "trailing":
        grid = np.rint(timesteps - np.arange(steps) * timesteps / steps).astype(np.int64) - 1
    elif spacing == "leading":
        grid = np.arange(steps)[::-1] * timesteps // steps + 1
        grid = np.minimum(grid, timesteps - 1)
    elif spacing == "linspace":
        grid = np.rint(np.linspace(timesteps - 1, 0, steps)).astype(np.int64)
    elif spacing == "compat":
        grid = np.arange(0, timesteps, timesteps // steps)[::-1] + 1
        if grid[0] >= timesteps:
            raise ValueError(
                f"steps={steps}: LDM's own grid reaches timestep {grid[0]} of {timesteps}; "
                "choose another count or spacing"
            )
    else:
        raise ValueError(f"spacing {spacing!r}: choose trailing, leading, linspace or compat")
    return grid
