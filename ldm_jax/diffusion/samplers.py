"""Samplers: from noise to latents in one `lax.scan`.

A sampler is two pure functions. `coefficients(schedule, grid, **options)` makes a table of every
step's numbers, in float64 on the host; it contains all mathematics of schedules, orders and η.
`step(x, history, c, denoise, noise)` applies one row of it. `sample` scans any sampler over a
denoiser `denoise(x, level) -> Prediction(x0, eps)`; of "meanflow" alone it is `denoise(x, level,
span=t − t')` of steps from t to t'. Only the shapes, the number of steps and the
sampler are static, so changing η, strength or grid compiles nothing.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import multistep, two_stage
from ldm_jax.diffusion.cache import Cache, empty
from ldm_jax.diffusion.grids import Grid
from ldm_jax.diffusion.multistep import Table
from ldm_jax.diffusion.parameterization import Denoiser
from ldm_jax.diffusion.schedule import Level, Schedule


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A method: its table, its step, the number of earlier arrays that it carries, its evaluations
    per step, its family of grids, and whether its denoiser takes each step's length, `span`."""

    coefficients: Callable[..., Table]
    step: Callable
    history: int = 0
    evaluations: int = 1
    family: str = "plain"
    spans: bool = False

    @property
    def options(self) -> dict[str, float]:
        """The options, such as eta, with their defaults."""
        parameters = inspect.signature(self.coefficients).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}


_x0, _eps = multistep.multistep("x0"), multistep.multistep("eps")
_heun, _two_s = two_stage.heun_step, two_stage.dpmpp_2s_step


def _euler_ancestral(schedule: Schedule, grid: Grid, eta: float = 1.0) -> Table:
    """Euler's step down, then noise up (k-diffusion); equal to DDIM."""
    return multistep.ddim(schedule, grid, eta)


def _flow_euler(schedule: Schedule, grid: Grid) -> Table:
    """Euler's method for dx/dt = ε − x0 on straight paths; equal to DDIM."""
    return multistep.ddim(schedule, grid)


def _mean_flow(schedule: Schedule, grid: Grid) -> Table:
    """z_r = z_t − (t − r)·u(z_t, r, t) (Geng et al. 2025, arXiv 2505.13447, algorithm 2): Euler's
    step with the mean velocity."""
    return multistep.ddim(schedule, grid) | {"span": grid.here.t - grid.after.t}


def _mean_flow_step(x, history, c, denoise, noise):
    def over(x, level):
        return denoise(x, level, span=c["span"])

    return _x0(x, history, c, over, noise)


SAMPLERS = {
    "ddim": Sampler(multistep.ddim, _x0, family="ddim"),
    "ddpm": Sampler(multistep.ddpm, _x0),
    "plms": Sampler(multistep.plms, multistep.plms_step, history=3, family="ddim"),
    "euler": Sampler(multistep.euler, _x0, family="euler"),
    "euler_ancestral": Sampler(_euler_ancestral, _x0, family="euler"),
    "heun": Sampler(two_stage.heun, _heun, evaluations=2, family="euler"),
    "lms": Sampler(multistep.lms, _eps, history=3, family="euler"),
    "dpmpp_2s_ancestral": Sampler(
        two_stage.dpmpp_2s_ancestral, _two_s, evaluations=2, family="euler"
    ),
    "dpmpp_2m": Sampler(multistep.dpmpp_2m, _x0, history=1, family="dpm"),
    "dpmpp_2m_sde": Sampler(multistep.dpmpp_2m_sde, _x0, history=1, family="dpm"),
    "dpmpp_3m_sde": Sampler(multistep.dpmpp_3m_sde, _x0, history=2, family="dpm"),
    "unipc": Sampler(multistep.unipc, multistep.unipc_step, history=3, family="dpm"),
    "lcm": Sampler(multistep.lcm, _x0),
    "flow_euler": Sampler(_flow_euler, _x0),
    "flow_heun": Sampler(two_stage.flow_heun, _heun, evaluations=2),
    "meanflow": Sampler(_mean_flow, _mean_flow_step, spans=True),
}

# From latents to noise, so not one of SAMPLERS.
DDIM_INVERSE = Sampler(
    two_stage.ddim_inverse, two_stage.ddim_inverse_step(refinements=3), evaluations=4
)


def get_sampler(name: str) -> Sampler:
    """A sampler by name; raises ValueError with the list of names."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def make_table(
    name: str, schedule: Schedule, grid: Grid, skip: int | None = None, **options: float
) -> Table:
    """The coefficients of a sampler on a grid; `options` are the sampler's.

    With `skip`, even 0, the table has a column "active" that turns the first steps off, and the
    method starts, without history, at step `skip`. The shapes stay the same, so a new strength
    compiles nothing.

    Raises:
      ValueError: an unknown sampler, or a grid that it cannot use.
    """
    sampler = get_sampler(name)
    steps = len(grid.here.t)
    if skip is None:
        return sampler.coefficients(schedule, grid, **options)
    # If every step is skipped, the rows are those of the last step, all turned off.
    late = grid.rows(np.s_[min(skip, steps - 1) :])
    table = sampler.coefficients(schedule, late, **options)
    rows = np.maximum(np.arange(steps) - skip, 0)
    return jax.tree.map(lambda v: v[rows], table) | {"active": np.arange(steps) >= skip}


def sample(
    sampler: Sampler,
    denoise: Denoiser,
    x: jax.Array,
    table: Table,
    keys: jax.Array,
    *,
    per_step: Any = None,
    before_step: Callable[[jax.Array, Level, jax.Array], jax.Array] | None = None,
    callback: Callable[[jax.Array, jax.Array], None] | None = None,
) -> jax.Array:
    """Latents (B, h, w, c) from x of that shape at the table's first level.

    `keys` (B,) are the examples' own; step i uses `fold_in(key, i)`. `per_step` is a pytree of
    (S, …) arrays, such as guidance; `denoise` gets the row of the step as a third argument.
    `before_step(x, level, keys)` may change x before each step. `callback` is called on the host
    from inside the program with the number of finished steps and the step's first prediction of x0.

    With a column "refresh" in the table, the first evaluation of each step gets `cache`, a
    `Cache` of what the steps keep.
    """
    dtype = x.dtype

    def body(carry, inputs):
        i, c, *row = inputs
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)

        def step(carry):
            x, history, kept = carry
            if before_step is not None:
                x = before_step(
                    x, c["level"], jax.vmap(jax.random.fold_in, (0, None))(step_keys, 1)
                )
            noise = None
            if "noise" in c or "churn" in c:
                noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], dtype))(step_keys)
            seen, cache = [], None if kept is None else Cache(c["refresh"], kept)

            def watched(x, level, **span):
                if cache is not None and not seen:
                    span = span | {"cache": cache}
                prediction = denoise(x, level, *row, **span)
                seen.append(prediction.x0)
                return prediction

            x, history = sampler.step(x, history, c, watched, noise)
            if callback is not None:
                jax.debug.callback(callback, i + 1, _whole(seen[0]))
            return x, history, None if cache is None else cache.value

        if "active" in c:
            return jax.lax.cond(c["active"], step, lambda carry: carry, carry), None
        return step(carry), None

    def cast(values):
        floating = jnp.issubdtype(values.dtype, jnp.floating)
        return jnp.asarray(values, dtype if floating else None)

    table = jax.tree.map(cast, table)
    steps = table["level"].t.shape[0]
    rows = (jnp.arange(steps), table, *(() if per_step is None else (per_step,)))
    kept = None
    if "refresh" in table:
        _, c, *row = jax.tree.map(lambda v: v[0], rows)
        span = {"span": c["span"]} if sampler.spans else {}
        kept = empty(lambda cache: denoise(x, c["level"], *row, cache=cache, **span))
    carry = (x, (jnp.zeros_like(x),) * sampler.history, kept)
    return jax.lax.scan(body, carry, rows)[0][0]


def _whole(x: jax.Array) -> jax.Array:
    """`x` on every device of the current mesh, if there is one, for a callback of the host."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec())
