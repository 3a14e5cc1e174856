"""Our schedules and grids against CompVis' code, diffusers 0.42.1 and k-diffusion 0.1.1.post1.

All in double precision; CompVis' code is stable-diffusion-sdkit 2.1.5. Not reproduced, on purpose:

- diffusers' leading grid for counts that do not divide T, whose first timestep is far from T;
- its flow grid for shift ≠ 1 without `sigmas`, whose lower end is shifted twice;
- its linspace grid of DPMSolverMultistep and UniPC, one step longer and cut at the clean end.
"""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from k_diffusion import external, sampling
from ldm.models.diffusion.dpm_solver.dpm_solver import DPM_Solver, NoiseScheduleVP
from ldm.modules.diffusionmodules.util import (
    make_beta_schedule,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
)

from ldm_jax.diffusion.grids import Grid, sampling_grid
from ldm_jax.diffusion.samplers import make_table
from ldm_jax.diffusion.schedule import EDMSchedule, FlowSchedule, make_schedule
from parity.problem import SCHEDULE, SD, STEPS, compvis, levels_of

pytestmark = [
    pytest.mark.usefixtures("dtype"),
    pytest.mark.parametrize("dtype", ["float64"], indirect=True),
]
for_steps = pytest.mark.parametrize("steps", STEPS)


@pytest.mark.parametrize("name", ["linear", "sqrt_linear", "sqrt", "cosine"])
def test_compvis_betas(name, agree):
    """β and ᾱ of every schedule that LDM's configurations name."""
    for bounds in [(1e-4, 2e-2), (0.0015, 0.0195), (0.00085, 0.012)]:
        if name == "sqrt":
            bounds = (bounds[0] ** 2, bounds[1] ** 2)
        for timesteps in (1000, 250):
            betas = make_beta_schedule(name, timesteps, *bounds)
            schedule = make_schedule(name, timesteps, *bounds)
            agree(schedule.betas, betas, 1e-13)
            agree(np.log(schedule.alphas_cumprod), np.log(np.cumprod(1.0 - betas)))


@pytest.mark.parametrize(
    "name, their_name",
    [("linear", "scaled_linear"), ("sqrt_linear", "linear"), ("squaredcos_cap_v2",) * 2],
)
def test_diffusers_betas(name, their_name, agree):
    """The same under diffusers' names."""
    schedule = make_schedule(name, **SD)
    table = {"beta_schedule": their_name, "beta_start": SD["start"], "beta_end": SD["end"]}
    agree(schedule.alphas_cumprod, diffusers.DDIMScheduler(**table).alphas_cumprod)


def test_compvis_tables(agree):
    """The buffers that `register_schedule` makes of ᾱ."""
    model = compvis()
    agree(SCHEDULE.alpha, model.sqrt_alphas_cumprod)
    agree(SCHEDULE.sigma, model.sqrt_one_minus_alphas_cumprod)
    agree(1.0 / SCHEDULE.at(np.arange(1000)).ratio, 1.0 / model.sqrt_recipm1_alphas_cumprod)


def test_zero_terminal_snr(agree):
    """diffusers' `rescale_zero_terminal_snr`."""
    betas = rescale_zero_terminal_snr(torch.tensor(SCHEDULE.betas))
    schedule = make_schedule("linear", **SD, zero_terminal_snr=True)
    agree(schedule.alphas_cumprod, torch.cumprod(1.0 - betas, 0))
    assert schedule.alphas_cumprod[-1] == 0.0


def test_compvis_uniform_grid():
    """ "compat" is CompVis' grid for every count, and an error where the original crashes."""
    for steps in range(1, 1001):
        grid = make_ddim_timesteps("uniform", steps, 1000, verbose=False)
        if grid[-1] < 1000:
            np.testing.assert_array_equal(levels_of(SCHEDULE, steps, "compat").t, [*grid[::-1], 0])
        else:
            with pytest.raises(ValueError, match="grid reaches timestep"):
                levels_of(SCHEDULE, steps, "compat")


def test_compvis_quad_grid():
    """ "quad" is CompVis' grid, without the timesteps that it repeats."""
    for steps in range(1, 1001):
        grid = make_ddim_timesteps("quad", steps, 1000, verbose=False)
        levels = levels_of(SCHEDULE, steps, "quad")
        np.testing.assert_array_equal(levels.t, [*np.unique(grid)[::-1], 0])


@for_steps
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_compvis_ddim_parameters(eta, steps, agree):
    """ᾱ where each step starts and ends, and σ_t; the last step ends at ᾱ_0, not at 1."""
    grid = make_ddim_timesteps("uniform", steps, 1000, verbose=False)
    abar = SCHEDULE.alphas_cumprod
    sigmas, here, after = make_ddim_sampling_parameters(abar, grid, eta, verbose=False)
    levels = levels_of(SCHEDULE, steps, "compat")
    agree(levels.alpha[:-1] ** 2, here[::-1])
    agree(levels.alpha[1:] ** 2, after[::-1])
    agree(make_table("ddim", SCHEDULE, Grid.chain(levels), eta=eta)["noise"], sigmas[::-1])


@for_steps
def test_compvis_dpm_grid(steps, agree):
    """Times that DPM-Solver tells the network, and its levels between the table's entries."""
    noise_schedule = NoiseScheduleVP("discrete", alphas_cumprod=compvis().alphas_cumprod)
    solver = DPM_Solver(None, noise_schedule)
    t = solver.get_time_steps("time_uniform", 1.0, 1.0 / 1000, steps, "cpu")
    levels = levels_of(SCHEDULE, steps, "dpm")
    agree(levels.t, (t - 1.0 / 1000) * 1000)
    agree(levels.alpha, noise_schedule.marginal_alpha(t))
    agree(levels.sigma, noise_schedule.marginal_std(t))


@pytest.mark.parametrize("name", ["karras", "exponential"])
@pytest.mark.parametrize("schedule", ["table", "edm"])
def test_k_diffusion_grids(schedule, name, agree):
    """`get_sigmas_karras` and `get_sigmas_exponential`, between the schedule's own ends."""
    make = getattr(sampling, f"get_sigmas_{name}")
    ends = {"table": SCHEDULE.at(np.array([0, 999])).ratio, "edm": (0.002, 80.0)}[schedule]
    schedule = {"table": SCHEDULE, "edm": EDMSchedule()}[schedule]
    for steps in (1, 2, *STEPS):
        ratio = levels_of(schedule, steps, name).ratio
        sigmas = np.asarray(make(steps, float(ends[0]), float(ends[1])))
        agree(ratio, sigmas)
        agree(np.log(ratio[:-1]), np.log(sigmas[:-1]))


def test_k_diffusion_times(agree):
    """Fractional times of given σ: k-diffusion's `sigma_to_t`."""
    table = external.DiscreteEpsDDPMDenoiser(None, compvis().alphas_cumprod, quantize=False)
    sigmas = np.geomspace(0.02, 20.0, 1001)
    agree(SCHEDULE.from_ratio(sigmas).t, table.sigma_to_t(torch.tensor(sigmas)), 1e-9)


def test_k_diffusion_quantized_times():
    """Nearest whole times of given σ, from end to end."""
    table = external.DiscreteEpsDDPMDenoiser(None, compvis().alphas_cumprod, quantize=True)
    sigmas = np.geomspace(0.02, 20.0, 1001)
    np.testing.assert_array_equal(
        SCHEDULE.time_of_ratio(jnp.asarray(sigmas)), table.sigma_to_t(torch.tensor(sigmas))
    )


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
def test_diffusers_timesteps(spacing):
    """Timesteps of DDIMScheduler for every count; leading with the offset 1 of Stable Diffusion.

    Not reproduced: sometimes, as for 61, it appends a timestep −1; and its 1,000 of "leading" begin
    with a timestep 1,000, which no table has.
    """
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    for steps in range(1, 1000 if spacing == "leading" else 1001):
        scheduler.set_timesteps(steps)
        here, after = sampling_grid(SCHEDULE, steps, spacing, family="ddim")
        np.testing.assert_array_equal(here.t, scheduler.timesteps[:steps])
        # The last step, too, goes T // S timesteps down; below the table it ends in clean latents.
        end = int(scheduler.timesteps[steps - 1]) - 1000 // steps
        abar = SCHEDULE.alphas_cumprod[end] if end >= 0 else 1.0
        np.testing.assert_allclose(after.alpha[-1] ** 2, abar, rtol=1e-12)


@for_steps
@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_diffusers_noise_grids(name, steps, agree):
    """σ and fractional timesteps of EulerDiscreteScheduler."""
    table = {"beta_schedule": "scaled_linear", "beta_start": SD["start"], "beta_end": SD["end"]}
    scheduler = diffusers.EulerDiscreteScheduler(**table, **{f"use_{name}_sigmas": True})
    scheduler.set_timesteps(steps)
    levels = levels_of(SCHEDULE, steps, name)
    agree(levels.ratio, scheduler.sigmas)
    agree(levels.t[:-1], scheduler.timesteps)


def test_lcm_timesteps():
    """LCMScheduler's timesteps, for every count."""
    scheduler = diffusers.LCMScheduler()
    for steps in range(1, 51):
        scheduler.set_timesteps(steps)
        levels = levels_of(SCHEDULE, steps, "lcm")
        np.testing.assert_array_equal(levels.t[:-1], scheduler.timesteps)


@for_steps
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_trailing(shift, steps, agree):
    """FlowMatchEulerDiscrete with the even σ its pipelines pass, and a shift."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps))
    levels = levels_of(FlowSchedule(), steps, "trailing", shift)
    agree(levels.sigma, scheduler.sigmas)
    agree(levels.t[:-1], scheduler.timesteps)


@for_steps
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"])
def test_flow_linspace(name, steps, agree):
    """The flow schedulers' own σ."""
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    scheduler.set_timesteps(steps)
    stride = 2 if name == "FlowMatchHeunDiscrete" else 1  # Heun's method lists most of them twice
    levels = levels_of(FlowSchedule(), steps, "linspace")
    agree(levels.sigma[:-1], scheduler.sigmas[:-1:stride])


def test_traced_levels(agree):
    """The float32 levels of training are the table's, and CompVis' q_sample's."""
    t = np.arange(1000)
    level = jax.jit(SCHEDULE.level)(t)
    model = compvis()
    agree(level.alpha, model.sqrt_alphas_cumprod, 1e-7)
    agree(level.sigma, model.sqrt_one_minus_alphas_cumprod, 1e-7)
