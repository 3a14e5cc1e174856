"""Whole runs of diffusers' schedulers, on every grid that they can be set to.

The way of a folder: the scheduler's JSON becomes our section `diffusion`, a sampler takes its grid,
its start and its end from there, and unit noise is drawn from. The network is known in closed form.
"""

import diffusers
import numpy as np
import pytest
import torch

from ldm_jax.diffusion.plan import Sampling, plan
from ldm_jax.diffusion.process import Diffusion
from ldm_jax.diffusion.samplers import get_sampler
from ldm_jax.interop.diffusers.components import Json
from ldm_jax.interop.diffusers.schedulers import diffusion_from, sampling_from
from parity.problem import SCHEDULE, SD, denoiser, finish, network, start
from parity.test_samplers import run

TABLE = {"beta_schedule": "scaled_linear", "beta_start": SD["start"], "beta_end": SD["end"]}
DDIM, PLMS = {"clip_sample": False}, {"skip_prk_steps": True}
FIRST = {"set_alpha_to_one": False}
SDE = {"algorithm_type": "sde-dpmsolver++"}
CASES = {
    "ddim": ("ddim", {}, "DDIM", DDIM, {}),
    "ddim first": ("ddim", {}, "DDIM", DDIM | FIRST, {}),
    "ddim eta": ("ddim", {"eta": 0.7}, "DDIM", DDIM, {"eta": 0.7}),
    "ddpm": ("ddpm", {}, "DDPM", DDIM, {}),
    "plms": ("plms", {}, "PNDM", PLMS, {}),
    "plms clean": ("plms", {}, "PNDM", PLMS | {"set_alpha_to_one": True}, {}),
    "euler": ("euler", {}, "EulerDiscrete", {}, {}),
    "euler_ancestral": ("euler_ancestral", {}, "EulerAncestralDiscrete", {}, {}),
    "heun": ("heun", {}, "HeunDiscrete", {}, {}),
    "lms": ("lms", {}, "LMSDiscrete", {}, {}),
    "dpmpp_2m": ("dpmpp_2m", {}, "DPMSolverMultistep", {}, {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}, "DPMSolverMultistep", SDE, {}),
    "unipc": ("unipc", {}, "UniPCMultistep", {}, {}),
}
GRIDS = [dict(timestep_spacing="leading", steps_offset=offset) for offset in (0, 1)]
GRIDS += [dict(timestep_spacing=spacing, steps_offset=1) for spacing in ("linspace", "trailing")]
WITH_KARRAS = ("euler", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
# One step, few, counts that do and do not divide 1,000, and more than half of it.
STEPS = (1, 2, 7, 30, 600)


def differences(case, grid, karras, monkeypatch, folder):
    """The largest difference from diffusers, by steps."""
    name, options, their_name, config, theirs = CASES[case]
    config = TABLE | config | grid | ({"use_karras_sigmas": True} if karras else {})
    scheduler = getattr(diffusers, f"{their_name}Scheduler")(**config)
    scheduler.save_pretrained(folder)
    content = Json(folder / "scheduler_config.json")
    own, section = sampling_from(content), diffusion_from(content, stable=False)
    assert own["sampler"] == name
    diffusion = Diffusion.from_config(section)
    sampling = Sampling.of(Sampling(name, **options), own)
    np.testing.assert_array_equal(diffusion.schedule.alphas_cumprod, SCHEDULE.alphas_cumprod)
    # The one object, so that programs are shared.
    model, mine = network("eps", SCHEDULE, torch), denoiser("eps", SCHEDULE)
    noise, found = start(np.float64), {}
    for steps in STEPS:
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) not in (steps, steps + (name == "plms"), 2 * steps - 1):
            continue  # its sum of steps may go one too far
        y = noise * float(scheduler.init_noise_sigma)
        expected = run(scheduler, model, y, monkeypatch, **theirs).numpy()
        planned = plan(diffusion, steps, sampling)
        x = planned.start.sigma.astype(np.float64) * noise
        ours = finish(get_sampler(name), planned.table, x, mine)
        found[steps] = float(np.abs(ours - expected).max() / max(1.0, np.abs(expected).max()))
    return found


@pytest.mark.usefixtures("dtype")
@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "{}{}".format(*grid.values()))
@pytest.mark.parametrize(
    "case, karras",
    [(case, False) for case in CASES] + [(case, True) for case in CASES if case in WITH_KARRAS],
)
def test_scheduler(case, karras, grid, monkeypatch, tmp_path):
    found = differences(case, grid, karras, monkeypatch, tmp_path)
    assert len(found) > 3 and max(found.values()) < 1e-6, found
