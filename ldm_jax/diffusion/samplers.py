"""Samplers: from noise to latents in one `lax.scan`.

A sampler is two pure functions: `coefficients`, the numbers of every step, computed in float64 on
the host, and `step`, one update of the carry. `sample` scans any of them over a denoiser
`denoise(x_t, t) -> Prediction(x0, eps)`; nothing but the shapes, the number of steps and the
sampler itself is static.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.parameterization import Prediction
from ldm_jax.diffusion.schedule import Schedule

Denoiser = Callable[[jax.Array, jax.Array], Prediction]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """`coefficients(schedule, timesteps)` → dict of (S,) arrays with at least the timesteps "t";
    `step(x, coefficients of the step, denoise, noise, eta)` → x."""

    coefficients: Callable[[Schedule, np.ndarray, bool], dict[str, np.ndarray]]
    step: Callable[..., jax.Array]


def ddim_coefficients(
    schedule: Schedule, timesteps: np.ndarray, to_clean: bool = True
) -> dict[str, np.ndarray]:
    """Per step α, σ here and at the next (cleaner) level, and the noise of η = 1.

    The last step lands on clean latents, or, with `to_clean` off, on ᾱ_0 as LDM's does.
    """
    abar = schedule.alphas_cumprod[timesteps]
    last = 1.0 if to_clean else schedule.alphas_cumprod[0]
    abar_next = np.append(abar[1:], last)
    # Song et al. 2021, eq. 16.
    noise = np.sqrt((1.0 - abar_next) / (1.0 - abar) * (1.0 - abar / abar_next))
    return {
        "t": timesteps,
        "alpha_next": np.sqrt(abar_next),
        "sigma_next": np.sqrt(1.0 - abar_next),
        "noise": noise,
    }


def ddim_step(
    x: jax.Array, c: dict[str, jax.Array], denoise: Denoiser, noise: jax.Array, eta: jax.Array
) -> jax.Array:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12); η = 1 is ancestral."""
    x0, eps = denoise(x, c["t"])
    stochastic = eta * c["noise"]
    direction = jnp.sqrt(jnp.maximum(c["sigma_next"] ** 2 - stochastic**2, 0.0))
    return c["alpha_next"] * x0 + direction * eps + stochastic * noise


SAMPLERS = {"ddim": Sampler(ddim_coefficients, ddim_step)}


def get_sampler(name: str) -> Sampler:
    """A sampler by name; raises ValueError that lists them."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def sample(
    sampler: Sampler,
    denoise: Denoiser,
    noise: jax.Array,
    coefficients: dict[str, Any],
    keys: jax.Array,
    eta: jax.Array | float = 0.0,
    progress: Callable[[jax.Array], None] | None = None,
) -> jax.Array:
    """Latents (B, h, w, c) from unit Gaussian noise of that shape.

    `keys` (B,) are the examples' own; step i draws from `fold_in(key, i)`. `progress`, if given, is
    called on the host with the number of finished steps, from inside the program.
    """

    def body(x, inputs):
        i, c = inputs
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        fresh = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(step_keys)
        x = sampler.step(x, c, denoise, fresh, eta)
        if progress is not None:
            jax.debug.callback(progress, i + 1)
        return x, None

    table = {
        name: jnp.asarray(values, jnp.int32 if name == "t" else jnp.float32)
        for name, values in coefficients.items()
    }
    steps = len(coefficients["t"])
    return jax.lax.scan(body, noise, (jnp.arange(steps), table))[0]
