"""Losses of students: closed forms that are exact students have none, and others do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.distillation import consistency_loss, guidance_loss
from ldm_jax.diffusion.grids import LCM_TEACHER_STEPS
from ldm_jax.diffusion.multistep import consistency_coefficients
from ldm_jax.diffusion.noise import all_examples
from ldm_jax.diffusion.objective import Objective
from ldm_jax.diffusion.parameterization import x0_coefficients
from ldm_jax.diffusion.process import Diffusion
from ldm_jax.diffusion.schedule import make_schedule

SD = make_schedule("linear", 1000, 0.00085, 0.012)
SHAPE, SPREAD = (6, 4, 4, 2), 0.7
EVERY = all_examples(SHAPE[0])
KEY = jax.random.key(0)
LATENTS = SPREAD * jax.random.normal(jax.random.key(1), SHAPE)


def gaussian(diffusion):
    """The exact network for latents of N(0, SPREAD²), in which all is linear (B, 1, 1, 1)."""
    table = jnp.asarray(best(SD, diffusion.parameterization))
    return lambda x, t: table[jnp.asarray(t, jnp.int32)].reshape(-1, 1, 1, 1) * x


def x0_slope(level):
    """E[x0 | x] / x."""
    return level.alpha * SPREAD**2 / (level.alpha**2 * SPREAD**2 + level.sigma**2)


def best(schedule, kind):
    """Output / x at each timestep."""
    level = schedule.at(np.arange(schedule.timesteps))
    a, b = (np.asarray(v) for v in x0_coefficients(kind, level, 0.5))
    return ((x0_slope(level) - a) / b).astype(np.float32)


def consistent(diffusion):
    """The student that follows DDIM's steps of that network to the end, by a product."""
    stride = SD.timesteps // LCM_TEACHER_STEPS
    times = np.append(0, np.arange(1, LCM_TEACHER_STEPS + 1) * stride - 1)
    level = SD.at(times)
    slope = x0_slope(level)
    eps = (1.0 - level.alpha * slope) / level.sigma
    step = level.alpha[:-1] * slope[1:] + level.sigma[:-1] * eps[1:]
    path = np.append(1.0, np.cumprod(step))  # from each of `times` to t = 0
    skip, out = (np.asarray(v) for v in consistency_coefficients(times.astype(float)))
    with np.errstate(divide="ignore", invalid="ignore"):
        x0 = np.where(out > 0, (path - skip) / out, 0.0)
    a, b = (np.asarray(v) for v in x0_coefficients(diffusion.parameterization, level, 0.5))
    table = np.zeros(SD.timesteps, np.float32)
    table[times] = (x0 - a) / b
    table = jnp.asarray(table)
    return lambda x, t: table[jnp.asarray(t, jnp.int32)].reshape(-1, 1, 1, 1) * x


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_a_student_that_follows_the_path_has_no_loss(kind):
    diffusion = Diffusion(SD, kind)
    student, teacher = consistent(diffusion), gaussian(diffusion)

    def loss(student, i):
        key = jax.random.fold_in(KEY, i)
        return consistency_loss(diffusion, student, teacher, LATENTS, key, EVERY, delta=1e-3)

    for i in range(8):
        # ε divides by α, which is 0.07 at the end.
        assert float(loss(student, i).max()) < (3e-6 if kind == "eps" else 1e-6)
    other = sum(float(loss(teacher, i).mean()) for i in range(8)) / 8
    assert other > 1e-3  # the teacher's own x0 is no end of its path


def test_every_time_of_the_grid_is_drawn_and_given_times_are_rounded_to_it():
    seen = []

    def student(x, t):
        seen.append(np.asarray(t))
        return x

    diffusion, many = Diffusion(SD, "v"), all_examples(2000)
    x = jnp.zeros((2000, 1, 1, 1))
    consistency_loss(diffusion, student, student, x, KEY, many)
    teacher, after, here = seen
    np.testing.assert_array_equal(teacher, here)
    assert set(here.tolist()) == set(range(19, 1000, 20))
    np.testing.assert_array_equal(after, np.maximum(here - 20, 0))
    seen.clear()
    times = jnp.asarray([0, 125, 875, 999])
    consistency_loss(diffusion, student, student, x[:4], KEY, all_examples(4), times)
    np.testing.assert_array_equal(seen[0], [19, 139, 879, 999])


def test_the_gradient_is_that_of_the_first_point_alone():
    """With x̂_s's f as a constant, computed beforehand."""
    diffusion = Diffusion(SD, "v")
    teacher = gaussian(diffusion)

    def own(w, constant=None):
        calls = []

        def student(x, t):
            calls.append(w if constant is None or calls else constant)
            return calls[-1] * x  # the first call is of x̂_s

        return consistency_loss(diffusion, student, teacher, LATENTS, KEY, EVERY).mean()

    found = jax.grad(own)(0.3)
    held = jax.grad(lambda w: own(w, 0.3))(0.3)
    assert float(found) == float(held) != 0.0


def test_a_guided_student_has_no_loss_and_another_has():
    diffusion, objective = Diffusion(SD, "eps"), Objective()
    scale = jnp.linspace(1.0, 7.0, SHAPE[0]).reshape(-1, 1, 1, 1)

    def teacher(x, t):
        return 0.2 * x + scale * (0.5 * x - 0.2 * x)

    def loss(student, times=None):
        arguments = (objective, diffusion, student, teacher, LATENTS, KEY, EVERY, times)
        return guidance_loss(*arguments)

    assert float(loss(lambda x, t: (0.2 + 0.3 * scale) * x).max()) < 1e-12
    # Of x, the errors are 0.3·(scale − 1) and 0.3·scale of the same x.
    times = jnp.full(SHAPE[0], 300)
    cond, uncond = (np.asarray(loss(lambda x, t, w=w: w * x, times)) for w in (0.5, 0.2))
    expected = ((np.asarray(scale).ravel() - 1.0) / np.asarray(scale).ravel()) ** 2
    np.testing.assert_allclose(cond / uncond, expected, rtol=1e-4, atol=1e-7)


def test_schedules_without_a_table():
    flow = Diffusion(make_schedule("flow", 1000), "flow")
    with pytest.raises(ValueError, match="for schedules of a table of timesteps"):
        consistency_loss(flow, lambda x, t: x, lambda x, t: x, LATENTS, KEY, EVERY)
