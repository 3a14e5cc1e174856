"""Noise schedules: the mixture of clean latents and noise at a time t.

Every forward process here is x_t = α_t·x0 + σ_t·ε. Samplers depend on the ratio σ/α (Karras et al.
2022 call it σ, as their α is 1); its logarithm is minus half the log signal-to-noise ratio. Three
families differ in how t determines it:

- `DiscreteSchedule`, α² + σ² = 1: a table of T levels, ᾱ_t = Π(1 − β_s) (Ho et al. 2020, eq. 4);
- `FlowSchedule`, α = 1 − t/T, σ = t/T: rectified flow (Liu et al. 2023; Lipman et al. 2023);
- `EDMSchedule`, α = 1, σ = t (Karras et al. 2022).

Each has `at(t)`, float64 on the host for the samplers' tables; `from_ratio(σ/α)`, its inverse;
`level(t)`, traced float32 for training; and `time(u)`, the t of a uniform u in [0, 1).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Level(NamedTuple):
    """Noise levels x = alpha·x0 + sigma·ε, and the network's input `t` at each."""

    t: jax.Array | np.ndarray
    alpha: jax.Array | np.ndarray
    sigma: jax.Array | np.ndarray

    @property
    def ratio(self):
        """σ/α, infinite where no signal is left."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha


@dataclasses.dataclass(frozen=True, eq=False)
class DiscreteSchedule:
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

    @property
    def betas(self) -> np.ndarray:
        """β_t = 1 − ᾱ_t/ᾱ_{t−1}."""
        return 1.0 - self.alphas_cumprod / np.append(1.0, self.alphas_cumprod[:-1])

    def at(self, t: np.ndarray) -> Level:
        """Levels of real t in [0, T−1]: log α is linear in t between the table's entries."""
        t = np.asarray(t, np.float64)
        below = np.floor(t).astype(int)
        part = t - below
        here, next_ = self.alpha[below], self.alpha[np.minimum(below + 1, self.timesteps - 1)]
        alpha = here ** (1.0 - part) * next_**part
        return Level(t, alpha, np.sqrt(1.0 - alpha**2))

    def from_ratio(self, ratio: np.ndarray) -> Level:
        """Levels of given σ/α; t is linear in its logarithm between the table's entries."""
        ratio = np.asarray(ratio, np.float64)
        with np.errstate(divide="ignore"):
            table = np.log(self.sigma / self.alpha)
            t = np.interp(np.log(ratio), table, np.arange(self.timesteps))
        alpha = 1.0 / np.sqrt(1.0 + ratio**2)
        return Level(t, alpha, np.sqrt(1.0 - alpha**2))

    def level(self, t: jax.Array) -> Level:
        """Levels of integer t, from the table."""
        alpha, sigma = (jnp.asarray(table, jnp.float32)[t] for table in (self.alpha, self.sigma))
        return Level(t, alpha, sigma)

    def time(self, u: jax.Array) -> jax.Array:
        """Integers in [0, T)."""
        return jnp.minimum((u * self.timesteps).astype(jnp.int32), self.timesteps - 1)

    def time_of_ratio(self, ratio: jax.Array) -> jax.Array:
        """The integer t whose σ/α is nearest, on a logarithmic scale."""
        with np.errstate(divide="ignore"):
            table = np.log(self.sigma / self.alpha)
        middles = jnp.asarray((table[1:] + table[:-1]) / 2.0, jnp.float32)
        return jnp.searchsorted(middles, jnp.log(ratio)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """α = 1 − t/T, σ = t/T for real t in [0, T]; the network's input is t."""

    timesteps: int = 1000

    def at(self, t: np.ndarray) -> Level:
        t = np.asarray(t, np.float64)
        return Level(t, 1.0 - t / self.timesteps, t / self.timesteps)

    def from_ratio(self, ratio: np.ndarray) -> Level:
        return self.at(self.timesteps / (1.0 + 1.0 / np.asarray(ratio, np.float64)))

    def level(self, t: jax.Array) -> Level:
        return Level(t, 1.0 - t / self.timesteps, t / self.timesteps)

    def time(self, u: jax.Array) -> jax.Array:
        return u * self.timesteps

    def time_of_ratio(self, ratio: jax.Array) -> jax.Array:
        return self.timesteps * ratio / (1.0 + ratio)


@dataclasses.dataclass(frozen=True)
class EDMSchedule:
    """α = 1, σ = t between `sigma_min` and `sigma_max` (Karras et al. 2022, table 1)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def at(self, t: np.ndarray) -> Level:
        t = np.asarray(t, np.float64)
        return Level(t, np.ones_like(t), t)

    def from_ratio(self, ratio: np.ndarray) -> Level:
        return self.at(ratio)

    def level(self, t: jax.Array) -> Level:
        return Level(t, jnp.ones_like(t), t)

    def time(self, u: jax.Array) -> jax.Array:
        """Uniform in log σ."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u

    def time_of_ratio(self, ratio: jax.Array) -> jax.Array:
        return ratio


Schedule = DiscreteSchedule | FlowSchedule | EDMSchedule


def _cosine_betas(timesteps: int, start: float, end: float) -> np.ndarray:
    """Nichol & Dhariwal 2021, eq. 17, β at most 0.999; takes no bounds."""
    del start, end
    s = 8e-3
    f = np.cos((np.arange(timesteps + 1) / timesteps + s) / (1 + s) * np.pi / 2) ** 2
    return np.clip(1.0 - f[1:] / f[:-1], 0.0, 0.999)


BETAS = {
    "linear": lambda n, start, end: np.linspace(start**0.5, end**0.5, n) ** 2,
    "sqrt_linear": lambda n, start, end: np.linspace(start, end, n),
    "sqrt": lambda n, start, end: np.sqrt(np.linspace(start, end, n)),
    "cosine": _cosine_betas,
    "squaredcos_cap_v2": _cosine_betas,
}


def make_schedule(
    name: str = "linear",
    timesteps: int = 1000,
    start: float = 1e-4,
    end: float = 2e-2,
    zero_terminal_snr: bool = False,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> Schedule:
    """A schedule by the name LDM's configurations use; `start` and `end` bound β.

    "linear" is the square of a line between √start and √end, which other libraries call
    "scaled_linear"; "sqrt_linear" is the plain line, "sqrt" its root; "cosine", also called
    "squaredcos_cap_v2", uses neither bound. "flow" and "edm" are the continuous families.
    `zero_terminal_snr` rescales a discrete schedule so that its last level is pure noise.

    Raises:
      ValueError: an unknown name, or one that cannot be rescaled.
    """
    if name in ("flow", "edm"):
        if zero_terminal_snr:
            raise ValueError(f"zero_terminal_snr is for tables of β; {name!r} has none")
        return FlowSchedule(timesteps) if name == "flow" else EDMSchedule(sigma_min, sigma_max)
    if name not in BETAS:
        raise ValueError(f"schedule {name!r}: choose one of {', '.join(BETAS)}, flow, edm")
    alphas_cumprod = np.cumprod(1.0 - BETAS[name](timesteps, start, end))
    if zero_terminal_snr:
        # Lin et al. 2023, algorithm 1: √ᾱ shifted to end at 0, then scaled to begin as before.
        root = np.sqrt(alphas_cumprod)
        alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return DiscreteSchedule(alphas_cumprod)
