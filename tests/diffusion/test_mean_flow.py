"""MeanFlow on data whose mean velocity is known, and against numpy.

Of data N(0, s²) the flow multiplies z by k(r)/k(t) from t to r, k(t)² = (1 − t)²·s² + t².
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.mean_flow import (
    MeanFlow,
    check_objective,
    draw_span,
    mean_flow_loss,
    mean_target,
)
from ldm_jax.diffusion.noise import all_examples, example_keys
from ldm_jax.diffusion.objective import Objective, draw_noise
from ldm_jax.diffusion.plan import plan
from ldm_jax.diffusion.process import Diffusion
from ldm_jax.diffusion.samplers import SAMPLERS, get_sampler, sample
from ldm_jax.diffusion.schedule import make_schedule

S = 0.5
LENGTHS = (1, 1000)
LOGIT = Objective(draw="logit_normal", draw_mean=-0.4)


def process(timesteps=1000):
    return Diffusion(make_schedule("flow", timesteps), "meanflow")


def spread(t):
    return jnp.sqrt(((1.0 - t) * S) ** 2 + t**2)


def velocity(x, t):
    """E[ε − x0 | x] of times (B, 1, 1, 1) in [0, 1]: x·k'/k."""
    return x * (t - (1.0 - t) * S**2) / spread(t) ** 2


def exact(timesteps, scale=1.0):
    """The mean velocity, times `scale`."""

    def network(x, t, span):
        t, span = (v.reshape(-1, 1, 1, 1) / timesteps for v in (t, span))
        apart = jnp.where(span > 0.0, span, 1.0)
        mean = x * (1.0 - spread(t - span) / spread(t)) / apart
        return scale * jnp.where(span > 0.0, mean, velocity(x, t))

    return network


def times(count, timesteps):
    t, r = np.sort(np.random.default_rng(0).uniform(0.05, 1.0, (2, count)), axis=0)[::-1]
    r[: count // 4] = t[: count // 4]
    t, r = (jnp.asarray(timesteps * v) for v in (t, r))
    return t, t - r


@pytest.mark.parametrize("timesteps", LENGTHS)
def test_the_mean_velocity_is_its_own_target(timesteps):
    """And no multiple of it is. The time's unit does not matter."""
    with jax.enable_x64(True):
        t, span = times(64, timesteps)
        x = jax.random.normal(jax.random.key(0), (64, 2, 2, 1))
        v = velocity(x, t.reshape(-1, 1, 1, 1) / timesteps)
        found, goal = mean_target(exact(timesteps), x, t, span, v, timesteps)
        np.testing.assert_allclose(found, goal, atol=1e-9)
        assert jnp.abs(found).max() > 1.0
        found, goal = mean_target(exact(timesteps, 0.9), x, t, span, v, timesteps)
        np.testing.assert_allclose(found - goal, -0.1 * v, atol=1e-9)


@pytest.mark.parametrize("timesteps", LENGTHS)
def test_the_loss_of_a_point_is_zero(timesteps):
    """There the velocity of a pair is that of the flow, and u = (z − x0)/t for every r."""
    point = jnp.linspace(-1.0, 1.0, 12).reshape(1, 2, 2, 3)

    def network(x, t, span):
        return (x - point) * timesteps / t.reshape(-1, 1, 1, 1)

    latents = jnp.broadcast_to(point, (32, 2, 2, 3))
    arguments = (process(timesteps), network, latents, jax.random.key(0))
    assert mean_flow_loss(MeanFlow(), Objective(), *arguments).max() < 1e-6
    shifted = (process(timesteps), lambda *a: network(*a) + 0.1, latents, jax.random.key(0))
    loss = mean_flow_loss(MeanFlow(power=0.0), Objective(), *shifted)
    assert loss.min() > 0.1  # 12·0.1², where r = t, and more elsewhere


def test_the_mean_velocity_is_where_the_loss_is_stationary():
    """Over pairs: the slope in a factor of u is 0 at 1, within four standard errors."""
    latents = S * jax.random.normal(jax.random.key(0), (1 << 16, 1, 1, 1))
    options = MeanFlow(equal=0.5, power=0.0)

    def losses(scale):
        network = exact(1000, scale)
        return mean_flow_loss(options, Objective(), process(), network, latents, jax.random.key(1))

    for scale, stationary in ((1.0, True), (1.1, False)):
        _, slopes = jax.jvp(losses, (scale,), (1.0,))
        error = slopes.std() / np.sqrt(slopes.size)
        assert (abs(slopes.mean()) < 4.0 * error) == stationary, (slopes.mean(), error)


# A small network with two times, in numpy for complex numbers too, whose imaginary part is then
# the derivative, exactly.
WEIGHTS = np.random.default_rng(1).normal(size=(3, 3)) / 2


def wavy(xp, x, t, h, turn=0.0):
    """t and h (B, 1, 1, 1), of 0 … 1."""
    return xp.sin(x @ WEIGHTS + 2.0 * t - 3.0 * h + turn) * (1.0 + t * h) + 0.3 * x


def by_hand(options, latents, eps, t, r, on, mask=1.0):
    """Algorithm 1 in numpy: the loss of each example, with t, r (B, 1, 1, 1) and `on` (B,)."""
    z, v = (1.0 - t) * latents + t * eps, eps - latents
    without, with_ = wavy(np, z, t, 0.0 * t, 1.0), wavy(np, z, t, 0.0 * t)
    guided = options.omega * v + (1.0 - options.omega - options.kappa) * without
    v = np.where(on[:, None, None, None], guided + options.kappa * with_, v)
    step = 1e-30j
    derivative = wavy(np, z + step * v, t + step, t + step - r).imag / 1e-30
    goal = v - (t - r) * derivative
    squared = (mask * (wavy(np, z, t, t - r) - goal) ** 2).sum((1, 2, 3))
    return squared / (squared + options.constant) ** options.power


@pytest.mark.parametrize("timesteps", LENGTHS)
@pytest.mark.parametrize(
    "options",
    [
        MeanFlow(),
        MeanFlow(equal=0.0, power=0.5, constant=1e-3),
        MeanFlow(equal=0.25, power=0.0, omega=2.0),
        MeanFlow(equal=0.25, power=0.75, omega=0.5, kappa=0.8, interval=(0.3, 0.6)),
    ],
)
def test_loss_is_the_algorithms_on_the_same_draws(options, timesteps):
    with jax.enable_x64(True):
        count, key, diffusion = 32, jax.random.key(3), process(timesteps)
        latents = jax.random.normal(jax.random.key(2), (count, 4, 4, 3))
        mask = jax.random.uniform(jax.random.key(4), (count, 4, 4, 1))
        guides = jnp.arange(count) % 3 > 0

        def of(x, t, span=0.0, turn=0.0):
            t, span = (jnp.reshape(v, (-1, 1, 1, 1)) / timesteps for v in (t, span))
            return wavy(jnp, x, t, span, turn)

        def network(x, t, span):
            return of(x, t, span)

        found = mean_flow_loss(
            *(options, LOGIT, diffusion, network, latents, key),
            mask=mask,
            unconditional=lambda x, t: of(x, t, turn=1.0),
            conditional=of,
            guides=guides,
        )
        keys, examples = [jax.random.fold_in(key, i) for i in range(4)], all_examples(count)
        t, r = draw_span(keys[0], keys[2], keys[3], options, LOGIT, diffusion, examples)
        eps = draw_noise(keys[1], latents.shape, 0.0, examples)
        t, r = (np.asarray(v, np.float64).reshape(-1, 1, 1, 1) / timesteps for v in (t, r))
        low, high = options.interval
        on = np.asarray(guides) & (t >= low).ravel() & (t <= high).ravel()
        on &= options.guided
        expected = by_hand(options, *map(np.asarray, (latents, eps)), t, r, on, np.asarray(mask))
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_the_target_is_a_constant_of_the_gradient():
    """The gradient is that of the squared distance to a fixed goal, with a fixed weight."""
    latents = jax.random.normal(jax.random.key(0), (8, 2, 2, 1))
    options = MeanFlow(power=0.5, omega=2.0)

    def loss(scale, fixed=None):
        def network(x, t, span):
            return scale * jnp.sin(x + t.reshape(-1, 1, 1, 1) / 1e3) * (1.0 + jnp.mean(span))

        guide = lambda x, t: network(x, t, jnp.zeros_like(t))  # noqa: E731
        arguments = (LOGIT, process(), network, latents, jax.random.key(1))
        return jnp.sum(mean_flow_loss(options, *arguments, unconditional=guide, conditional=guide))

    found = jax.grad(loss)(0.7)

    def of_parts(scale):
        """The same by hand, with a goal and weights of 0.7."""
        keys, examples = (
            [jax.random.fold_in(jax.random.key(1), i) for i in range(4)],
            all_examples(8),
        )
        t, r = draw_span(keys[0], keys[2], keys[3], options, LOGIT, process(), examples)
        eps, share = draw_noise(keys[1], latents.shape), (t / 1000).reshape(-1, 1, 1, 1)
        x = (1 - share) * latents + share * eps

        def u(scale, x, t, span):
            return scale * jnp.sin(x + t.reshape(-1, 1, 1, 1) / 1e3) * (1.0 + jnp.mean(span))

        v = 2.0 * (eps - latents) - u(0.7, x, t, jnp.zeros_like(t))
        _, goal = mean_target(lambda *a: u(0.7, *a), x, t, t - r, v, 1000)
        total = jnp.sum((u(scale, x, t, t - r) - goal) ** 2, (1, 2, 3))
        weight = (jnp.sum((u(0.7, x, t, t - r) - goal) ** 2, (1, 2, 3)) + 0.01) ** 0.5
        return jnp.sum(total / weight)

    assert found == pytest.approx(float(jax.grad(of_parts)(0.7)), rel=1e-4)


def test_times_are_ordered_and_as_often_equal_as_asked():
    keys = jax.random.split(jax.random.key(0), 3)
    options = MeanFlow(equal=0.75)
    t, r = draw_span(*keys, options, LOGIT, process(), all_examples(20_000))
    assert (r <= t).all() and (t < 1000).all() and (r > 0).all()
    assert float((r == t).mean()) == pytest.approx(0.75, abs=0.015)
    none = dataclasses.replace(options, equal=0.0)
    t, r = draw_span(*keys, none, LOGIT, process(), all_examples(20_000))
    assert (r < t).all()
    logits = np.log(np.append(t, r)) - np.log1p(-np.append(t, r) / 1e3) - np.log(1e3)
    assert (logits.mean(), logits.std()) == pytest.approx((-0.4, 1.0), abs=0.02)


def test_an_example_does_not_depend_on_its_batch():
    latents = jax.random.normal(jax.random.key(0), (6, 2, 2, 1))

    def loss(count):
        arguments = (process(), exact(1000), latents[:count], jax.random.key(1))
        return mean_flow_loss(MeanFlow(), LOGIT, *arguments)

    np.testing.assert_allclose(loss(2), loss(6)[:2], rtol=1e-5)


def drawn(name, steps, x, timesteps=1000, strength=None):
    diffusion = process(timesteps)
    run = plan(diffusion, steps, name, strength=strength)

    def denoise(x, level, span=0.0):
        def network(x, t):
            return exact(timesteps)(x, t, jnp.full(len(x), span))

        return diffusion.denoiser(network)(x, level)

    return jax.jit(
        lambda x, table: sample(
            get_sampler(name), denoise, x, table, example_keys(jax.random.key(0), len(x))
        )
    )(x, run.table)


@pytest.mark.parametrize("timesteps", LENGTHS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_any_number_of_steps_is_exact(steps, timesteps):
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    np.testing.assert_allclose(drawn("meanflow", steps, x, timesteps), S * x, atol=1e-6)


def test_other_samplers_follow_the_velocity():
    """With r = t the network is one of the flow; one step of Euler's then ends at the mean, 0."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    np.testing.assert_allclose(drawn("flow_heun", 64, x), S * x, atol=2e-3)
    np.testing.assert_allclose(drawn("flow_euler", 1, x), 0.0 * x, atol=1e-6)


def test_a_picture_is_changed_from_the_level_of_its_strength():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    end = drawn("meanflow", 4, x, strength=0.5)
    np.testing.assert_allclose(end, x * S / spread(0.5), atol=1e-6)


def test_what_it_cannot_be_used_with():
    with pytest.raises(
        ValueError, match="'meanflow' is of straight paths: use schedule.name='flow'"
    ):
        Diffusion(make_schedule("linear"), "meanflow")
    flow = Diffusion(make_schedule("flow"), "flow")
    with pytest.raises(
        ValueError, match="sampler 'meanflow' is of models with .* 'meanflow'; this one has 'flow'"
    ):
        plan(flow, 1, "meanflow")
    assert [name for name, sampler in SAMPLERS.items() if sampler.spans] == ["meanflow"]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(equal=1.5), r"mean_flow.equal=1.5: a share of examples, 0 … 1"),
        (dict(power=-1.0), "power must be at least 0, and constant above 0"),
        (dict(constant=0.0), "power must be at least 0, and constant above 0"),
        (dict(kappa=1.0), "omega must be at least 0, and kappa from 0 to below 1"),
        (dict(omega=float("nan")), "omega must be at least 0"),
        (dict(interval=(0.6, 0.3)), r"mean_flow.interval=\(0.6, 0.3\): give two shares"),
        (dict(interval=(0.6,)), r"mean_flow.interval=\(0.6,\): give two shares"),
    ],
)
def test_options_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        MeanFlow(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(loss="l1"), "objective.loss: MeanFlow has its own loss and weight.*leave it at 'l2'"),
        (dict(weighting="min_snr"), "objective.weighting: MeanFlow has its own"),
        (dict(input_perturbation=0.1), "objective.input_perturbation: MeanFlow has its own"),
        (dict(draw="stratified"), "objective.draw='stratified': MeanFlow draws two times"),
    ],
)
def test_objectives_that_it_does_not_use(fields, message):
    with pytest.raises(ValueError, match=message):
        check_objective(Objective(**fields))
    check_objective(LOGIT)
