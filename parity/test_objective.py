"""Our losses and their gradients against CompVis' `p_losses`, diffusers 0.42.1 and k-diffusion.

The same latents, times, noise and network, a linear one whose matrix the gradients are of. Losses
agree to 1e-5, gradients to 1e-4, in float32. CompVis' code is stable-diffusion-sdkit 2.1.5,
k-diffusion is 0.1.1.post1.
"""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from k_diffusion import external, layers
from k_diffusion import utils as k_utils

from ldm_jax.diffusion.noise import per_example
from ldm_jax.diffusion.objective import (
    Objective,
    diffusion_loss,
    draw_noise,
    draw_times,
    vlb_weights,
)
from ldm_jax.diffusion.parameterization import target
from ldm_jax.diffusion.process import Diffusion
from ldm_jax.diffusion.schedule import EDMSchedule, FlowSchedule, Level, Schedule
from parity.problem import SCHEDULE, SD, compvis

COUNT = 8
SHAPE = (COUNT, 4, 4, 3)
KEY = jax.random.key(11)
LATENTS = np.asarray(jax.random.normal(jax.random.key(1), SHAPE))
MATRIX = np.asarray(jax.random.normal(jax.random.key(2), (3, 3)))
LOGVAR = np.asarray(0.3 * jax.random.normal(jax.random.key(3), (1000,)))


def linear(matrix, x, t):
    """A network in either library."""
    return (x @ matrix) * (1.0 + 0.001 * t).reshape(-1, 1, 1, 1)


def drawn(objective: Objective, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """The times and the noise that `diffusion_loss` draws from KEY."""
    keys, o = [jax.random.fold_in(KEY, i) for i in range(2)], objective
    t = np.asarray(draw_times(keys[0], COUNT, schedule, o.draw, o.draw_mean, o.draw_std))
    return torch.tensor(t), torch.tensor(np.asarray(draw_noise(keys[1], SHAPE)))


def ours(objective, schedule, kind, logvar=None, sigma_data=0.5, latents=LATENTS):
    """(B,) losses, and the gradients of their mean: of the matrix, and of logvar if given."""

    def mean(matrix, logvar):
        def network(x, t):
            return linear(matrix, x, t)

        loss = diffusion_loss(
            objective, Diffusion(schedule, kind, sigma_data), network, latents, KEY, logvar
        )
        return loss.mean(), loss

    arguments = (0,) if logvar is None else (0, 1)
    (_, losses), gradients = jax.value_and_grad(mean, arguments, has_aux=True)(MATRIX, logvar)
    return losses, gradients


def compare(agree, losses, gradients, expected, *parameters):
    """`expected` (B,) losses, or their mean, in torch."""
    if expected.ndim == 0:
        losses = losses.mean()
    expected_gradients = torch.autograd.grad(expected.mean(), parameters)
    expected = expected.detach()
    agree(np.asarray(losses) / expected.numpy(), np.ones(expected.shape))
    for gradient, theirs in zip(gradients, expected_gradients, strict=True):
        scale = float(theirs.abs().max())
        agree(gradient / scale, theirs / scale, 1e-4)


def parameter(values) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(np.asarray(values)))


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("terms", ["simple", "logvar", "vlb", "all"])
def test_compvis_p_losses(terms, kind, loss, agree):
    """LatentDiffusion.p_losses with learned log-variances, the variational bound, or both."""
    theirs = {"loss_type": loss}
    objective = {"loss": loss}
    if terms in ("vlb", "all"):
        theirs |= {"l_simple_weight": 0.7, "original_elbo_weight": 0.01}
        objective |= {"simple_weight": 0.7, "vlb_weight": 0.01}
    if terms in ("logvar", "all"):
        theirs["learn_logvar"] = objective["learn_logvar"] = True
    objective = Objective(**objective)
    model = compvis(kind, **theirs)
    matrix, logvar, parameters = parameter(MATRIX), None, ()
    if objective.learn_logvar:
        logvar, model.logvar = LOGVAR, parameter(LOGVAR)
        parameters = (model.logvar,)
    model.apply_model = lambda x, t, cond: linear(matrix, x, t)
    t, noise = drawn(objective, SCHEDULE)
    expected, _ = model.p_losses(torch.tensor(LATENTS), None, t, noise)
    losses, gradients = ours(objective, SCHEDULE, kind, logvar)
    compare(agree, losses, gradients, expected, matrix, *parameters)


@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
@pytest.mark.parametrize("v_posterior", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_compvis_vlb_weights(kind, v_posterior, dtype, agree):
    """The table `lvlb_weights`, with its slip for "x0": ½√ᾱ/(2 − ᾱ), where 2(1 − ᾱ) was meant."""
    model = compvis(kind, v_posterior=v_posterior)
    agree(vlb_weights(SCHEDULE, kind, v_posterior) / model.lvlb_weights.numpy(), np.ones(1000))


def diffusers_loss(kind, matrix, t, noise, weigh):
    """A diffusers training script: mean squared errors, weighed by a function of the SNR."""
    table = {"beta_schedule": "scaled_linear", "beta_start": SD["start"], "beta_end": SD["end"]}
    scheduler = diffusers.DDPMScheduler(**table)
    latents = torch.tensor(LATENTS)
    x = scheduler.add_noise(latents, noise, t)
    velocity = scheduler.get_velocity(latents, noise, t)
    goal = {"eps": noise, "v": velocity, "x0": latents}[kind]
    error = torch.nn.functional.mse_loss(linear(matrix, x, t), goal, reduction="none")
    return error.mean(dim=(1, 2, 3)) * weigh(compute_snr(scheduler, t))


MIN_SNR = {
    "eps": lambda snr: snr.clamp(max=5.0) / snr,
    "v": lambda snr: snr.clamp(max=5.0) / (snr + 1.0),
    "x0": lambda snr: snr.clamp(max=5.0),
}


@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_diffusers_min_snr(kind, weighting, agree):
    """The loss of diffusers' training scripts: add_noise, get_velocity, compute_snr, γ = 5."""
    objective = Objective(weighting=weighting)
    matrix = parameter(MATRIX)
    weigh = MIN_SNR[kind] if weighting == "min_snr" else torch.ones_like
    expected = diffusers_loss(kind, matrix, *drawn(objective, SCHEDULE), weigh)
    compare(agree, *ours(objective, SCHEDULE, kind), expected, matrix)


EDM_DRAW = {"draw": "log_normal", "draw_mean": -1.2, "draw_std": 1.2}
WEIGHTINGS = {
    # k-diffusion weighs the error of the network, we that of x0; its soft minimum is at γ = 1/σ_d².
    "karras": Objective(weighting="edm", **EDM_DRAW),
    "soft-min-snr": Objective(weighting="soft_min_snr", weighting_parameter=4.0, **EDM_DRAW),
    "snr": Objective(weighting="eps", **EDM_DRAW),
}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_edm_loss(weighting, agree):
    """k-diffusion's preconditioned loss, with each of its weightings."""
    objective, schedule = WEIGHTINGS[weighting], EDMSchedule()
    sigma, noise = drawn(objective, schedule)
    matrix = parameter(MATRIX)

    def network(x, sigma):
        return linear(matrix, x, sigma.log() / 4.0)

    model = layers.Denoiser(network, sigma_data=0.5, weighting=weighting)
    expected = model.loss(torch.tensor(LATENTS), noise, sigma)
    compare(agree, *ours(objective, schedule, "edm"), expected, matrix)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_k_diffusion_loss(kind, agree):
    """k-diffusion's losses around networks of a table, written in σ = σ_t/α_t."""
    t, noise = drawn(Objective(), SCHEDULE)
    matrix = parameter(MATRIX)
    abar = torch.tensor(SCHEDULE.alphas_cumprod, dtype=torch.float32)
    wrapper = {"eps": "DiscreteEpsDDPMDenoiser", "v": "DiscreteVDDPMDenoiser"}[kind]
    model = getattr(external, wrapper)(lambda x, t: linear(matrix, x, t), abar, quantize=True)
    expected = model.loss(torch.tensor(LATENTS), noise, model.sigmas[t])
    compare(agree, *ours(Objective(), SCHEDULE, kind), expected, matrix)


SGM = {
    "eps": lambda sigma: sigma**-2.0,
    "v": lambda sigma: (sigma**2 + 1.0) / sigma**2,
    "edm": lambda sigma: (sigma**2 + 0.25) / (0.5 * sigma) ** 2,
    "x0": torch.ones_like,
}


@pytest.mark.parametrize("weighting", SGM)
@pytest.mark.parametrize("kind", ["eps", "v"])
def test_sgm_weightings(kind, weighting, agree):
    """w(σ)·(D − x0)² with the weightings of generative-models, D by k-diffusion's wrapper."""
    objective = Objective(weighting=weighting)
    t, noise = drawn(objective, SCHEDULE)
    abar = torch.tensor(SCHEDULE.alphas_cumprod, dtype=torch.float32)
    wrapper = {"eps": "DiscreteEpsDDPMDenoiser", "v": "DiscreteVDDPMDenoiser"}[kind]
    matrix = parameter(MATRIX)
    model = getattr(external, wrapper)(lambda x, t: linear(matrix, x, t), abar, quantize=True)
    sigma, latents = model.sigmas[t], torch.tensor(LATENTS)
    denoised = model(latents + sigma.reshape(-1, 1, 1, 1) * noise, sigma)
    expected = (denoised - latents).square().mean(dim=(1, 2, 3)) * SGM[weighting](sigma)
    compare(agree, *ours(objective, SCHEDULE, kind), expected, matrix)


def test_velocity(agree):
    """`target` of "v" at all times is diffusers' get_velocity and CompVis' get_v."""
    t = torch.arange(1000)
    x0, noise = torch.tensor(np.random.default_rng(0).normal(size=(2, 1000, 2, 2, 1))).float()
    level = Level(*(v.reshape(-1, 1, 1, 1) for v in SCHEDULE.level(jnp.arange(1000))))
    mine = target("v", x0.numpy(), noise.numpy(), level, 0.5)
    table = {"beta_schedule": "scaled_linear", "beta_start": SD["start"], "beta_end": SD["end"]}
    agree(mine, diffusers.DDPMScheduler(**table).get_velocity(x0, noise, t))
    agree(mine, compvis("v").get_v(x0, noise, t))


@pytest.mark.parametrize("std", [0.5, 1.0])
@pytest.mark.parametrize("mean", [-0.6, 0.0])
def test_logit_normal_times(mean, std, monkeypatch, agree):
    """diffusers' `compute_density_for_timestep_sampling`, from the same normal numbers."""
    normal = torch.tensor(np.asarray(per_example(jax.random.normal, KEY, (COUNT,))))
    monkeypatch.setattr(torch, "normal", lambda mean, std, **kwargs: mean + std * normal)
    u = compute_density_for_timestep_sampling("logit_normal", COUNT, mean, std)
    t = draw_times(KEY, COUNT, FlowSchedule(), "logit_normal", mean, std)
    agree(t / 1000.0, u)


def test_log_normal_times(monkeypatch, agree):
    """k-diffusion's `rand_log_normal`, from the same normal numbers."""
    normal = torch.tensor(np.asarray(per_example(jax.random.normal, KEY, (COUNT,)))).double()
    uniform = (torch.special.ndtr(normal) - 1e-7) / (1.0 - 2e-7)
    monkeypatch.setattr(k_utils, "stratified_with_settings", lambda *args, **kwargs: uniform)
    sigma = k_utils.rand_log_normal((COUNT,), -1.2, 1.2)
    t = draw_times(KEY, COUNT, EDMSchedule(), "log_normal", -1.2, 1.2)
    agree(np.log(t), sigma.log())
