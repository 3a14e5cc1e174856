"""Losses of a student that imitates a guided teacher: in one evaluation a step, or in few steps.

A teacher's guided output is uncond + scale·(cond − uncond), two evaluations. Guidance distillation
trains one network of the scale (Meng et al. 2023, §3.1). A latent consistency model maps every
point of a path of the guided process to its end (Luo et al. 2023, algorithm 1).
"""

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.grids import LCM_TEACHER_STEPS
from ldm_jax.diffusion.multistep import consistency_coefficients
from ldm_jax.diffusion.noise import Examples, per_example
from ldm_jax.diffusion.objective import Objective, draw_noise, draw_times, per_example_loss
from ldm_jax.diffusion.parameterization import (
    Network,
    Prediction,
    network_inputs,
    to_prediction,
)
from ldm_jax.diffusion.process import Diffusion
from ldm_jax.diffusion.schedule import DiscreteSchedule, Level


def guidance_loss(
    objective: Objective,
    diffusion: Diffusion,
    student: Network,
    teacher: Network,
    latents: jax.Array,
    key: jax.Array,
    examples: Examples,
    times: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Per-example loss (B,), the distance between the outputs of `student(x, t)` and of the guided
    `teacher(x, t)` at the objective's times, or at `times` (B,). See `objective.diffusion_loss`."""
    o, t = objective, times
    if t is None:
        own = jax.random.fold_in(key, 0)
        t = draw_times(own, examples, diffusion.schedule, o.draw, o.draw_mean, o.draw_std)
    level = _level(diffusion, t)
    x = _noised(diffusion, latents, level, key, examples)
    goal = jax.lax.stop_gradient(_output(diffusion, teacher, x, level))
    found = _output(diffusion, student, x, level)
    return per_example_loss(o.loss, found, goal, o.huber_delta, mask)


def consistency_loss(
    diffusion: Diffusion,
    student: Network,
    teacher: Network,
    latents: jax.Array,
    key: jax.Array,
    examples: Examples,
    times: jax.Array | None = None,
    mask: jax.Array | None = None,
    delta: float = 1e-3,
) -> jax.Array:
    """Per-example loss (B,): √(e² + δ²) − δ with e = f(x_t) − f(x̂_s), averaged.

    t is one of the `LCM_TEACHER_STEPS` times of the teacher's grid (the one next to `times`, or a
    random one), s the next lower one or 0, x̂_s the DDIM step of the guided teacher from x_t to s,
    and f(x_t) = c_skip(t)·x_t + c_out(t)·x0, x0 that of the student. The gradient is that of f(x_t)
    alone; f(x̂_s) is of the same parameters (Song & Dhariwal 2024, §3.2, in place of an average).

    Raises ValueError for a schedule that is no table.
    """
    schedule = diffusion.schedule
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError("consistency distillation is for schedules of a table of timesteps")
    count = min(LCM_TEACHER_STEPS, schedule.timesteps)
    stride = schedule.timesteps // count
    if times is None:

        def draw(key, shape):
            return jax.random.randint(key, shape, 0, count)

        index = per_example(draw, jax.random.fold_in(key, 0), (len(latents),), examples)
    else:
        index = jnp.clip(jnp.asarray(times, jnp.int32) // stride, 0, count - 1)
    t = (index + 1) * stride - 1
    here, after = _level(diffusion, t), _level(diffusion, jnp.maximum(t - stride, 0))
    x = _noised(diffusion, latents, here, key, examples)
    guided = _predicted(diffusion, teacher, x, here)
    reached = jax.lax.stop_gradient(after.alpha * guided.x0 + after.sigma * guided.eps)
    goal = jax.lax.stop_gradient(_consistent(diffusion, student, reached, after))
    found = _consistent(diffusion, student, x, here)
    return per_example_loss("huber", found, goal, delta, mask) / (2.0 * delta)


def _level(diffusion: Diffusion, t: jax.Array) -> Level:
    """(B, 1, 1, 1) each."""
    return Level(*(v.reshape(-1, 1, 1, 1) for v in diffusion.schedule.level(t)))


def _noised(diffusion, latents, level, key, examples):
    eps = draw_noise(jax.random.fold_in(key, 1), latents.shape, 0.0, examples)
    return level.alpha * latents + level.sigma * eps


def _output(diffusion: Diffusion, network: Network, x: jax.Array, level: Level) -> jax.Array:
    inputs, t = network_inputs(diffusion.parameterization, x, level, diffusion.sigma_data)
    return network(inputs, t.reshape(-1)).astype(x.dtype)


def _predicted(diffusion: Diffusion, network: Network, x: jax.Array, level: Level) -> Prediction:
    output = _output(diffusion, network, x, level)
    return to_prediction(diffusion.parameterization, output, x, level, diffusion.sigma_data)


def _consistent(diffusion: Diffusion, network: Network, x: jax.Array, level: Level) -> jax.Array:
    skip, out = consistency_coefficients(level.t)
    return skip * x + out * _predicted(diffusion, network, x, level).x0
