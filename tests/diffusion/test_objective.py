"""Draws, weights and distances of the training objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.noise import per_example
from ldm_jax.diffusion.objective import (
    Objective,
    diffusion_loss,
    draw_noise,
    draw_times,
    loss_weight,
    per_example_loss,
    vlb_weights,
)
from ldm_jax.diffusion.parameterization import target
from ldm_jax.diffusion.process import Diffusion
from ldm_jax.diffusion.schedule import Level, make_schedule
from tests.diffusion.closed_form import MEANS, STDS, WEIGHTS, mixture

TABLE, FLOW, EDM = make_schedule("linear", 10), make_schedule("flow"), make_schedule("edm")
LEVEL = Level(0.0, np.float32(0.6), np.float32(0.8))
SNR = 0.5625


def test_timesteps_are_uniform_integers_over_the_whole_table():
    t = np.asarray(draw_times(jax.random.key(0), 20_000, TABLE))
    counts = np.bincount(t, minlength=10)
    assert t.min() == 0 and t.max() == 9 and len(counts) == 10
    # χ² with 9 degrees of freedom exceeds 30 once in two thousand draws.
    assert ((counts - 2000) ** 2 / 2000).sum() < 30


def test_stratified_times_lie_one_in_each_part():
    t = np.asarray(draw_times(jax.random.key(0), 50, FLOW, "stratified"))
    assert sorted((t / 20).astype(int).tolist()) == list(range(50))


def test_logit_normal_and_log_normal_have_their_laws():
    t = draw_times(jax.random.key(0), 20_000, FLOW, "logit_normal", 0.5, 0.7) / 1000
    logit = np.log(t / (1 - t))
    assert abs(logit.mean() - 0.5) < 0.02 and abs(logit.std() - 0.7) < 0.02
    sigma = draw_times(jax.random.key(0), 20_000, EDM, "log_normal", -1.2, 1.2)
    assert abs(np.log(sigma).mean() + 1.2) < 0.03 and abs(np.log(sigma).std() - 1.2) < 0.03
    table = make_schedule("linear", 1000, 0.00085, 0.012)
    t = np.asarray(draw_times(jax.random.key(0), 20_000, table, "log_normal", 0.0, 0.5))
    ratio = table.at(t).ratio
    assert t.dtype == np.int32 and abs(np.log(ratio).mean()) < 0.02


def test_unknown_draw_lists_the_known():
    with pytest.raises(ValueError, match="time draw 'even': choose one of uniform, stratified"):
        draw_times(jax.random.key(0), 4, TABLE, "even")


def test_an_example_draws_the_same_in_any_batch():
    draws = [per_example(jax.random.normal, jax.random.key(3), (n, 5)) for n in (2, 7)]
    np.testing.assert_array_equal(draws[0], draws[1][:2])
    noises = [draw_noise(jax.random.key(3), (n, 4, 4, 2), offset=0.5) for n in (2, 7)]
    np.testing.assert_array_equal(noises[0], noises[1][:2])


def test_offset_noise_moves_whole_channels():
    noise = draw_noise(jax.random.key(0), (512, 32, 32, 2), offset=0.5)
    assert abs(noise.mean((1, 2)).std() - np.hypot(0.5, 1 / 32)) < 0.03
    assert abs((noise - noise.mean((1, 2), keepdims=True)).std() - 1.0) < 0.01


@pytest.mark.parametrize("kind, expected", [
    ("l1", [2.0, 0.5]),
    ("l2", [4.0, 0.25]),
    ("huber", [0.2 * (4.01**0.5 - 0.1), 0.2 * (0.26**0.5 - 0.1)]),
])  # fmt: skip
def test_loss_is_the_mean_over_each_example(kind, expected):
    output = np.stack([np.full((2, 2, 1), 3.0), np.full((2, 2, 1), 0.5)])
    target = np.stack([np.full((2, 2, 1), 1.0), np.full((2, 2, 1), 1.0)])
    np.testing.assert_allclose(per_example_loss(kind, output, target), expected, rtol=1e-5)


def test_unknown_loss_and_weighting_list_the_known():
    with pytest.raises(ValueError, match="loss 'l3': choose l1, l2 or huber"):
        per_example_loss("l3", np.zeros((1, 1)), np.zeros((1, 1)))
    with pytest.raises(ValueError, match="weighting 'even': choose one of simple, min_snr"):
        loss_weight("even", "eps", LEVEL, 0.5, 5.0)


@pytest.mark.parametrize("weighting, kind, parameter, expected", [
    ("simple", "eps", 0.0, 1.0),
    ("min_snr", "eps", 0.3, 0.3 / SNR),  # min(SNR, γ)/SNR
    ("min_snr", "eps", 5.0, 1.0),
    ("min_snr", "v", 0.3, 0.3 / (SNR + 1.0)),
    ("min_snr", "x0", 5.0, SNR),
    ("soft_min_snr", "x0", 5.0, 1.0 / (1.0 / SNR + 1.0 / 5.0)),
    ("p2", "eps", 1.0, 1.0 / (1.0 + SNR)),
    ("sigmoid", "eps", 0.5, 1.0 / (1.0 + np.exp(np.log(SNR) - 0.5))),
    ("edm", "edm", 0.0, 1.0),  # F is weighed evenly
    ("edm", "x0", 0.0, SNR + 4.0),
    ("eps", "eps", 0.0, 1.0),
    ("v", "v", 0.0, 1.0),
    ("x0", "x0", 0.0, 1.0),
    ("eps", "x0", 0.0, SNR),
    ("eps", "flow", 0.0, SNR * (0.8 / 1.4) ** 2),
])  # fmt: skip
def test_weights_are_those_of_their_papers(weighting, kind, parameter, expected):
    assert loss_weight(weighting, kind, LEVEL, 0.5, parameter) == pytest.approx(expected, rel=1e-5)


def test_vlb_weights_are_the_originals():
    schedule = make_schedule("linear", 1000, 0.0015, 0.0195)
    beta, abar = schedule.betas[500], schedule.alphas_cumprod[499:501]
    posterior = beta * (1 - abar[0]) / (1 - abar[1])
    wanted = beta**2 / (2 * posterior * (1 - beta) * (1 - abar[1]))
    assert vlb_weights(schedule, "eps")[500] == pytest.approx(wanted, rel=1e-12)
    for kind in ("eps", "x0", "v"):
        weights = vlb_weights(schedule, kind)
        assert weights[0] == weights[1] and np.isfinite(weights).all()
    assert vlb_weights(schedule, "x0")[500] == pytest.approx(0.5 * abar[1] ** 0.5 / (2 - abar[1]))


def loss(objective, network, kind="eps", schedule=TABLE, logvar=None, count=6):
    latents = jax.random.normal(jax.random.key(1), (count, 4, 4, 2))
    return diffusion_loss(
        objective, Diffusion(schedule, kind), network, latents, jax.random.key(2), logvar
    )


def silent(x, t):
    return jnp.zeros_like(x)


def test_logvar_and_vlb_enter_as_in_the_original():
    """L/exp(logvar_t) + logvar_t, and the bound's weight on the plain loss."""
    times = []

    def network(x, t):
        times.append(t)
        return silent(x, t)

    plain = loss(Objective(), network)
    logvar = jnp.linspace(-1.0, 1.0, 10)
    learned = loss(Objective(learn_logvar=True), silent, logvar=logvar)
    values = logvar[times[0]]
    np.testing.assert_allclose(learned, plain / np.exp(values) + values, rtol=1e-5)
    bound = loss(Objective(simple_weight=0.5, vlb_weight=2.0), silent)
    table = vlb_weights(TABLE, "eps")[times[0]]
    np.testing.assert_allclose(bound, 0.5 * plain + 2.0 * table * plain, rtol=1e-5)


def test_input_perturbation_noises_the_input_and_not_the_target():
    inputs = []

    def network(x, t):
        inputs.append(x)
        return silent(x, t)

    plain, perturbed = (loss(Objective(input_perturbation=p), network) for p in (0.0, 0.3))
    np.testing.assert_allclose(plain, perturbed, rtol=1e-6)
    assert 0.0 < np.abs(inputs[0] - inputs[1]).max() < 1.5


@pytest.mark.parametrize("kind, schedule, draw", [
    ("eps", "linear", "uniform"),
    ("x0", "linear", "stratified"),
    ("v", "linear", "uniform"),
    ("flow", "flow", "logit_normal"),
    ("edm", "edm", "log_normal"),
])  # fmt: skip
@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
def test_the_optimum_is_the_true_denoiser(kind, schedule, draw, weighting):
    """On data whose denoiser is known, tilting or shifting its output raises the loss."""
    schedule = make_schedule(schedule)
    key = jax.random.key(0)
    component = jax.random.choice(key, 2, (512, 8, 8, 1), p=jnp.asarray(WEIGHTS))
    noise = jax.random.normal(jax.random.key(1), component.shape)
    latents = jnp.asarray(MEANS)[component] + jnp.asarray(STDS)[component] * noise
    objective = Objective(weighting=weighting, draw=draw)

    def mean_loss(tilt, shift):
        def network(x, t):
            t = t.reshape(-1, 1, 1, 1)
            if kind == "edm":  # its inputs are ln(σ)/4 and x/√(σ² + ¼)
                sigma = jnp.exp(4.0 * t)
                level, x = Level(t, jnp.ones_like(sigma), sigma), x * jnp.sqrt(sigma**2 + 0.25)
            else:
                level = schedule.level(t)
            return target(kind, *mixture(x, level), level, 0.5) + tilt * x + shift

        return diffusion_loss(objective, Diffusion(schedule, kind), network, latents, key).mean()

    slope = jax.jit(jax.grad(mean_loss, argnums=(0, 1)))(0.0, 0.0)
    steep = jax.jit(jax.grad(mean_loss, argnums=(0, 1)))(0.2, 0.2)
    assert abs(slope[0]) < 0.06 * abs(steep[0]) and abs(slope[1]) < 0.06 * abs(steep[1])
