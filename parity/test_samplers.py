"""Our samplers against k-diffusion 0.1.1.post1, diffusers 0.42.1 and CompVis' own code.

Everywhere the same network, start and noise (see `problem.py`), and the whole way from noise to
latents. CompVis' code is stable-diffusion-sdkit 2.1.5. Not reproduced, on purpose:

- diffusers' Euler and flow Heun with churn, which add the noise after the network's evaluation;
- its SDE solver's last step of first order where there are fewer than 15 steps and a noisy end;
- its DPMSolverSinglestep, whose second look is at a point of the grid: ours is half-way in log σ;
- the thresholding by norm that CompVis' PLMS knows in place of a percentile.
"""

import sys

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from k_diffusion import external, layers, sampling
from ldm.models.diffusion import ddim, ddpm
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver.sampler import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler

from ldm_jax.diffusion.guidance import classifier_free, dynamic_threshold
from ldm_jax.diffusion.parameterization import make_denoiser
from ldm_jax.diffusion.samplers import Sampler
from ldm_jax.diffusion.schedule import EDMSchedule, FlowSchedule, Level, make_schedule
from ldm_jax.diffusion.two_stage import ddim_inverse, ddim_inverse_step
from parity.problem import (
    SCHEDULE,
    SD,
    SHAPE,
    STEPS,
    compvis,
    denoised,
    levels_of,
    network,
    noises,
    ours,
    start,
)

for_steps = pytest.mark.parametrize("steps", STEPS)


def inject(monkeypatch, module, name: str, noise: list[torch.Tensor]) -> None:
    """The module draws our noise, in order."""
    queue = iter(noise)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: next(queue), raising=False)


def ending_noisy(levels: Level) -> Level:
    """The levels, but for an end at the table's first entry."""
    return Level(*(np.append(v[:-1], w) for v, w in zip(levels, SCHEDULE.at([0]), strict=True)))


# k-diffusion: the name there, its options, our name, our options

CHURN = {"churn": 12.0, "churn_min": 0.1, "churn_max": 10.0, "churn_scale": 1.003}
S_CHURN = {"s_churn": 12.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.003}
K_DIFFUSION = {
    "euler": ("euler", {}, "euler", {}),
    "ddim": ("euler", {}, "ddim", {}),
    "euler churn": ("euler", S_CHURN, "euler", CHURN),
    "euler_ancestral": ("euler_ancestral", {}, "euler_ancestral", {}),
    "euler_ancestral eta": ("euler_ancestral", {"eta": 0.6}, "euler_ancestral", {"eta": 0.6}),
    "heun": ("heun", {}, "heun", {}),
    "heun churn": ("heun", S_CHURN, "heun", CHURN),
    "lms": ("lms", {}, "lms", {}),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", {}, "dpmpp_2s_ancestral", {}),
    "dpmpp_2s_ancestral eta": ("dpmpp_2s_ancestral", {"eta": 0.6}) * 2,
    "dpmpp_2s_ancestral ode": ("dpmpp_2s_ancestral", {"eta": 0.0}) * 2,
    "dpmpp_2m": ("dpmpp_2m", {}, "dpmpp_2m", {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}, "dpmpp_2m_sde", {}),
    "dpmpp_2m_sde eta": ("dpmpp_2m_sde", {"eta": 0.5}, "dpmpp_2m_sde", {"eta": 0.5}),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {}, "dpmpp_3m_sde", {}),
    "dpmpp_3m_sde eta": ("dpmpp_3m_sde", {"eta": 0.5}, "dpmpp_3m_sde", {"eta": 0.5}),
}


def k_diffusion(name, options, model, x, sigmas, monkeypatch):
    noise = noises(len(sigmas) - 1, x.dtype)
    inject(monkeypatch, torch, "randn_like", noise)
    if "ancestral" in name or "sde" in name:
        queue = iter(noise)
        options = options | {"noise_sampler": lambda *sigmas: next(queue)}
    method = getattr(sampling, f"sample_{name}")
    x, sigmas = torch.tensor(x), torch.tensor(sigmas.astype(x.dtype))
    return method(model, x, sigmas, disable=True, **options)


@for_steps
@pytest.mark.parametrize("case", K_DIFFUSION)
def test_k_diffusion(case, steps, dtype, monkeypatch, agree):
    """Karras' σ between the ends of a table, with k-diffusion's wrapper of ε networks, which looks
    up fractional times for σ."""
    their_name, theirs, name, options = K_DIFFUSION[case]
    levels = levels_of(SCHEDULE, steps, "karras")
    abar = torch.tensor(SCHEDULE.alphas_cumprod.astype(dtype))
    model = external.DiscreteEpsDDPMDenoiser(network("eps", SCHEDULE, torch), abar, quantize=False)
    x = start(dtype)
    y = (x / levels.alpha[0]).astype(dtype)
    expected = k_diffusion(their_name, theirs, model, y, levels.ratio, monkeypatch)
    agree(ours(name, SCHEDULE, levels, x, **options), expected)


EDM = EDMSchedule()


def edm_network(x, log_sigma, xp):
    """The F of Karras et al. that makes the denoiser exact; its input is ln σ."""
    sigma = xp.exp(log_sigma).reshape(-1, 1, 1, 1)
    total = xp.sqrt(sigma**2 + 0.25)
    return (denoised(x * total, 1.0, sigma, xp) - 0.25 / total * x) * total / (0.5 * sigma)


edm_denoise = make_denoiser("edm", lambda x, t: edm_network(x, 4.0 * t, jnp), 0.5)


@for_steps
@pytest.mark.parametrize(
    "case", [c for c in K_DIFFUSION if not c.endswith((" eta", " ode", "ddim"))]
)
def test_k_diffusion_edm(case, steps, dtype, monkeypatch, agree):
    """σ from 80 to 0.002, even in its logarithm, with k-diffusion's preconditioned network."""
    their_name, theirs, name, options = K_DIFFUSION[case]
    levels = levels_of(EDM, steps, "exponential")
    x = 80.0 * start(dtype)
    model = layers.Denoiser(lambda x, sigma: edm_network(x, sigma.log(), torch), sigma_data=0.5)
    expected = k_diffusion(their_name, theirs, model, x, levels.sigma, monkeypatch)
    agree(ours(name, EDM, levels, x, denoise=edm_denoise, **options), expected)


# diffusers: our name, our options, the scheduler, its configuration, the options of its step

CLEAN = {"clip_sample": False, "set_alpha_to_one": True}
PNDM = {"skip_prk_steps": True, "set_alpha_to_one": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
UNIPC = {"solver_type": "bh2", "solver_order": 2, "predict_x0": True}
V, X0 = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
NOISY_END = {"final_sigmas_type": "sigma_min"}
DIFFUSERS = {
    "ddim": ("ddim", {}, "DDIM", CLEAN, {}),
    "ddim v": ("ddim", {}, "DDIM", CLEAN | V, {}),
    "ddim x0": ("ddim", {}, "DDIM", CLEAN | X0, {}),
    "ddim eta": ("ddim", {"eta": 0.7}, "DDIM", CLEAN, {"eta": 0.7}),
    "ddpm": ("ddpm", {}, "DDPM", {"clip_sample": False}, {}),
    "plms": ("plms", {}, "PNDM", PNDM, {}),
    "euler": ("euler", {}, "EulerDiscrete", {}, {}),
    "euler_ancestral": ("euler_ancestral", {}, "EulerAncestralDiscrete", {}, {}),
    "heun": ("heun", {}, "HeunDiscrete", {}, {}),
    "lms": ("lms", {}, "LMSDiscrete", {}, {}),
    "dpmpp_2m": ("dpmpp_2m", {}, "DPMSolverMultistep", {}, {}),
    "dpmpp_2m noisy end": ("dpmpp_2m", {}, "DPMSolverMultistep", NOISY_END, {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}, "DPMSolverMultistep", SDE, {}),
    "unipc": ("unipc", {}, "UniPCMultistep", UNIPC, {}),
    "unipc noisy end": ("unipc", {}, "UniPCMultistep", UNIPC | NOISY_END, {}),
    "lcm": ("lcm", {}, "LCM", CLEAN, {}),
}
IN_SIGMA = ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete")
KIND = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def scheduler_of(name: str, **config):
    table = {"beta_schedule": "scaled_linear", "beta_start": SD["start"], "beta_end": SD["end"]}
    if name != "LCM":
        table["timestep_spacing"] = "trailing"
    return getattr(diffusers, f"{name}Scheduler")(**(table | config))


def run(scheduler, model, x, monkeypatch, **options) -> torch.Tensor:
    """The loop of a diffusers pipeline, from x in the scheduler's own coordinates."""
    noise = noises(len(scheduler.timesteps), x.dtype)
    if isinstance(scheduler, diffusers.DDPMScheduler):
        noise[-1] = torch.zeros(SHAPE)  # its last step draws with a variance of 1e-20, not of 0
    inject(monkeypatch, sys.modules[type(scheduler).__module__], "randn_tensor", noise)
    x = torch.tensor(x)
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(seen, t), t, x, **options).prev_sample
        assert x.dtype == torch.get_default_dtype()
    return x


@for_steps
@pytest.mark.parametrize("case", DIFFUSERS)
def test_diffusers(case, steps, dtype, monkeypatch, agree):
    """On diffusers' trailing timesteps, or those of LCM, to clean latents or the first entry."""
    name, options, their_name, config, theirs = DIFFUSERS[case]
    scheduler = scheduler_of(their_name, **config)
    scheduler.set_timesteps(steps)
    kind = KIND[scheduler.config.prediction_type]
    levels = levels_of(SCHEDULE, steps, "lcm" if name == "lcm" else "trailing")
    if "noisy end" in case:
        levels = ending_noisy(levels)
    x = start(dtype)
    y = (x / levels.alpha[0]).astype(dtype) if their_name in IN_SIGMA else x
    expected = run(scheduler, network(kind, SCHEDULE, torch), y, monkeypatch, **theirs)
    agree(ours(name, SCHEDULE, levels, x, kind, **options), expected)


@for_steps
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_dynamic_threshold(name, steps, dtype, monkeypatch, agree):
    """diffusers' `_threshold_sample` in the loop, and ε recomputed from the clipped x0.

    Comparable for our limit 1; diffusers' `sample_max_value` bounds the percentile instead.
    """
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1e3}
    their_name = {"ddim": "DDIM", "dpmpp_2m": "DPMSolverMultistep"}[name]
    scheduler = scheduler_of(their_name, **config, **X0)
    scheduler.set_timesteps(steps)
    theirs = {"use_clipped_model_output": True} if name == "ddim" else {}
    model, mine = network("x0", SCHEDULE, torch), network("x0", SCHEDULE, jnp)
    x = start(dtype)
    expected = run(scheduler, lambda x, t: 2.5 * model(x, t), x, monkeypatch, **theirs)
    denoise = dynamic_threshold(make_denoiser("x0", lambda x, t: 2.5 * mine(x, t), 0.5), 0.9)
    levels = levels_of(SCHEDULE, steps, "trailing")
    agree(ours(name, SCHEDULE, levels, x, denoise=denoise), expected)


ZERO_SNR = make_schedule("linear", **SD, zero_terminal_snr=True)


@for_steps
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_zero_terminal_snr(eta, steps, dtype, monkeypatch, agree):
    """DDIM of a velocity network from pure noise.

    DDIM alone: diffusers' other schedulers leave a little signal, ᾱ = 2⁻²⁴, at the last timestep.
    """
    scheduler = scheduler_of("DDIM", rescale_betas_zero_snr=True, **CLEAN, **V)
    scheduler.set_timesteps(steps)
    x = start(dtype)
    expected = run(scheduler, network("v", ZERO_SNR, torch), x, monkeypatch, eta=eta)
    levels = levels_of(ZERO_SNR, steps, "trailing")
    agree(ours("ddim", ZERO_SNR, levels, x, "v", eta=eta), expected)


FLOW = FlowSchedule()


@for_steps
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler(shift, steps, dtype, monkeypatch, agree):
    """FlowMatchEulerDiscrete on the even σ that its pipelines pass."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps))
    x = start(dtype)
    expected = run(scheduler, network("flow", FLOW, torch), x, monkeypatch)
    levels = levels_of(FLOW, steps, "trailing", shift)
    agree(ours("flow_euler", FLOW, levels, x, "flow"), expected)


@for_steps
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_heun(shift, steps, dtype, monkeypatch, agree):
    """FlowMatchHeunDiscrete on its own σ, whose lower end it shifts twice.

    The last of them is 0.001: five steps come to it from 0.25, and dividing by it makes float32's
    rounding, theirs as much as ours, over a hundred times larger.
    """
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    sigmas = np.append(scheduler.sigmas[:-1:2], 0.0)
    x = start(dtype)
    expected = run(scheduler, network("flow", FLOW, torch), x, monkeypatch)
    levels = FLOW.at(1000.0 * sigmas)
    coarse = steps == 5 and x.dtype == np.float32
    agree(ours("flow_heun", FLOW, levels, x, "flow"), expected, 5e-5 if coarse else None)


@for_steps
def test_ddim_inverse(steps, dtype, monkeypatch, agree):
    """DDIMInverse, the inversion without refinements, from clean latents to noise."""
    scheduler = scheduler_of("DDIMInverse", **CLEAN)
    scheduler.set_timesteps(steps)
    x = 0.5 * start(dtype)
    expected = run(scheduler, network("eps", SCHEDULE, torch), x, monkeypatch)
    levels = levels_of(SCHEDULE, steps, "trailing")
    inverse = Sampler(ddim_inverse, ddim_inverse_step(refinements=0))
    agree(ours(inverse, SCHEDULE, levels, x), expected)


# CompVis


def compvis_ddim(model, steps, x, discretize="uniform", eta=0.0, **options):
    sampler = DDIMSampler(model)
    sampler.make_schedule(steps, discretize, eta, verbose=False)
    return sampler.ddim_sampling(None, SHAPE, x_T=torch.tensor(x), **options)[0]


@for_steps
@pytest.mark.parametrize("kind, eta", [("eps", 0.0), ("eps", 0.7), ("v", 0.0)])
def test_compvis_ddim(kind, eta, steps, dtype, monkeypatch, agree):
    """DDIMSampler on its own grid, which ends at ᾱ_0."""
    inject(monkeypatch, ddim, "noise_like", noises(steps, dtype))
    x = start(dtype)
    expected = compvis_ddim(compvis(kind), steps, x, eta=eta)
    levels = levels_of(SCHEDULE, steps, "compat")
    agree(ours("ddim", SCHEDULE, levels, x, kind, eta=eta), expected)


@for_steps
def test_compvis_ddim_quad(steps, dtype, monkeypatch, agree):
    """DDIMSampler on its quadratic grid; timesteps that it visits twice do nothing."""
    inject(monkeypatch, ddim, "noise_like", noises(steps, dtype))
    x = start(dtype)
    expected = compvis_ddim(compvis(), steps, x, "quad")
    levels = levels_of(SCHEDULE, steps, "quad")
    agree(ours("ddim", SCHEDULE, levels, x), expected)


@for_steps
def test_compvis_guidance(steps, dtype, monkeypatch, agree):
    """Classifier-free guidance of DDIMSampler, the unconditional half first."""
    scale = 5.0
    inject(monkeypatch, ddim, "noise_like", noises(steps, dtype))
    model, mine = compvis(), network("eps", SCHEDULE, jnp)
    predict = network("eps", SCHEDULE, torch)
    model.apply_model = lambda x, t, cond: predict(x, t) + cond * torch.tanh(x)
    condition = np.array([0.1, -0.2, 0.3], dtype).reshape(3, 1, 1, 1)
    null = np.full_like(condition, -0.05)
    x = start(dtype)
    sampler = DDIMSampler(model)
    sampler.make_schedule(steps, verbose=False)
    expected, _ = sampler.ddim_sampling(
        torch.tensor(condition),
        SHAPE,
        x_T=torch.tensor(x),
        unconditional_guidance_scale=scale,
        unconditional_conditioning=torch.tensor(null),
    )

    def conditional(x, t, condition):
        return mine(x, t) + condition * jnp.tanh(x)

    denoise = make_denoiser("eps", classifier_free(conditional, [condition], null, scale), 0.5)
    levels = levels_of(SCHEDULE, steps, "compat")
    agree(ours("ddim", SCHEDULE, levels, x, denoise=denoise), expected)


@for_steps
def test_compvis_encode(steps, dtype, agree):
    """DDIMSampler.encode, but for its defect: it tells the network the number of the step instead
    of the timestep, which is put right here on its side."""
    model = compvis()
    sampler = DDIMSampler(model)
    sampler.make_schedule(steps, verbose=False)
    predict, grid = network("eps", SCHEDULE, torch), torch.tensor(sampler.ddim_timesteps)
    model.apply_model = lambda x, t, cond: predict(x, grid[t])
    x = 0.5 * start(dtype)
    expected, _ = sampler.encode(torch.tensor(x), None, steps)
    levels = levels_of(SCHEDULE, steps, "compat")
    inverse = Sampler(ddim_inverse, ddim_inverse_step(refinements=0))
    agree(ours(inverse, SCHEDULE, levels, x), expected)


@for_steps
def test_compvis_plms(steps, dtype, agree):
    """PLMSSampler: a pseudo improved Euler step, then Adams–Bashforth."""
    sampler = PLMSSampler(compvis())
    sampler.make_schedule(steps, verbose=False)
    x = start(dtype)
    expected, _ = sampler.plms_sampling(None, SHAPE, x_T=torch.tensor(x))
    levels = levels_of(SCHEDULE, steps, "compat")
    agree(ours("plms", SCHEDULE, levels, x), expected)


@for_steps
@pytest.mark.parametrize("kind", ["eps", "v"])
def test_compvis_dpm_solver(kind, steps, dtype, agree):
    """DPMSolverSampler: multistep, second order, real timesteps."""
    x = start(dtype)
    sampler = DPMSolverSampler(compvis(kind))
    condition = torch.zeros(SHAPE[0])  # it takes none for an answer, but not None
    expected, _ = sampler.sample(steps, SHAPE[0], SHAPE[1:], condition, x_T=torch.tensor(x))
    levels = levels_of(SCHEDULE, steps, "dpm")
    agree(ours("dpmpp_2m", SCHEDULE, levels, x, kind), expected)


@pytest.mark.parametrize("kind", ["eps", "x0"])
def test_compvis_ddpm(kind, dtype, monkeypatch, agree):
    """`p_sample_loop`: ancestral sampling over all 1000 timesteps."""
    inject(monkeypatch, ddpm, "noise_like", noises(1000, dtype))
    x = start(dtype)
    expected = compvis(kind).p_sample_loop(None, SHAPE, x_T=torch.tensor(x), verbose=False)
    levels = levels_of(SCHEDULE, 1000, "trailing")
    agree(ours("ddpm", SCHEDULE, levels, x, kind), expected)
