"""The JSON of diffusers' schedulers, as our section `diffusion`, and back."""

import logging
from typing import Any

from ldm_jax.interop.diffusers.components import VERSION, Json

log = logging.getLogger(__name__)

# The sampler of each scheduler, or the nearest; and its defaults for the spacing and for whether
# the last step ends in clean latents.
SCHEDULERS = {
    "DDIMScheduler": ("ddim", "leading", True),
    "DDPMScheduler": ("ddpm", "leading", True),
    "PNDMScheduler": ("plms", "leading", False),
    "LCMScheduler": ("lcm", "lcm", True),
    "DEISMultistepScheduler": ("dpmpp_2m", "linspace", True),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", "linspace", True),
    "DPMSolverSDEScheduler": ("dpmpp_2m_sde", "linspace", True),
    "DPMSolverSinglestepScheduler": ("dpmpp_2m", "linspace", True),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", "linspace", True),
    "EulerDiscreteScheduler": ("euler", "linspace", True),
    "HeunDiscreteScheduler": ("heun", "linspace", True),
    "KDPM2AncestralDiscreteScheduler": ("dpmpp_2s_ancestral", "linspace", True),
    "KDPM2DiscreteScheduler": ("heun", "linspace", True),
    "LMSDiscreteScheduler": ("lms", "linspace", True),
    "UniPCMultistepScheduler": ("unipc", "linspace", True),
}
# Schedulers whose default noise is Stable Diffusion's, not DDPM's.
NARROW = ("LCM", "Heun", "KDPM2", "DPMSolverSDE")
BETAS = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
MEANINGS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SPACINGS = ("leading", "trailing", "linspace", "lcm")


# Keys of the samplers themselves whose other values nothing here has.
SAMPLED_OTHERWISE = {
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2"),
    "lower_order_final": (True,),
    "euler_at_final": (False,),
    "use_beta_sigmas": (False,),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
}


def diffusion_from(json: Json, stable: bool) -> dict[str, Any]:
    """The section `diffusion` of a scheduler.

    `stable`: it belongs to a pipeline of Stable Diffusion 1 or 2, which does not clip and adds 1 to
    "leading" timesteps, whatever the JSON says.
    """
    name = json.class_name
    if name not in SCHEDULERS:
        raise json.error("_class_name", name, f"one of {', '.join(SCHEDULERS)}")
    _, spacing, clean = SCHEDULERS[name]
    betas = json.take("beta_schedule", "scaled_linear" if name == "LCMScheduler" else "linear")
    if betas not in BETAS:
        raise json.error("beta_schedule", betas, f"one of {', '.join(BETAS)}")
    meaning = json.take("prediction_type", "epsilon")
    if meaning not in MEANINGS:
        raise json.error("prediction_type", meaning, f"one of {', '.join(MEANINGS)}")
    json.expect(trained_betas=None, thresholding=False, timestep_type="discrete")
    if name in ("DDIMScheduler", "DDPMScheduler") and not stable:
        clipped = json.take("clip_sample", True)
        if clipped:
            raise json.error("clip_sample", clipped, "false, for no sampler here clips latents")
    given = json.take("timestep_spacing", spacing)
    if given not in SPACINGS:
        raise json.error("timestep_spacing", given, f"one of {', '.join(SPACINGS)}")
    spacing = spacing if spacing == "lcm" else given
    start, end = (0.00085, 0.012) if name.startswith(NARROW) else (0.0001, 0.02)
    schedule = dict(
        name=BETAS[betas],
        timesteps=json.take("num_train_timesteps", 1000),
        start=json.take("beta_start", start),
        end=json.take("beta_end", end),
        zero_terminal_snr=bool(json.take("rescale_betas_zero_snr", False)),
    )
    clean = json.take("set_alpha_to_one", clean)
    offset = 1 if stable else json.take("steps_offset", 0)
    grid = dict(spacing=spacing, offset=offset, end="clean" if clean else "first")
    return dict(schedule=schedule, parameterization=MEANINGS[meaning], sigma_data=0.5) | grid


def sampling_from(json: Json) -> dict[str, Any]:
    """`sampler` and, for schedulers that have one, the `spacing` of noise, for `sampling`."""
    name, _, _ = SCHEDULERS.get(json.class_name, ("ddim", None, None))
    if str(json.take("algorithm_type")).startswith("sde-"):
        name = "dpmpp_2m_sde"
    for key, known in SAMPLED_OTHERWISE.items():
        value = json.take(key, known[0])
        if value is not None and value not in known:
            log.warning("%s: %s=%r is not supported, so pictures differ from diffusers'",
                        json.path, key, value)  # fmt: skip
    spacings = ("karras", "exponential")
    given = [spacing for spacing in spacings if json.take(f"use_{spacing}_sigmas")]
    return dict(sampler=name) | (dict(spacing=given[0]) if given else {})


def scheduler_to(diffusion: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a DDIMScheduler, or, for its grid, an LCMScheduler.

    Raises ValueError for noise or a grid that neither has.
    """
    schedule = dict(diffusion["schedule"])
    names = {ours: theirs for theirs, ours in BETAS.items()} | {
        "squaredcos_cap_v2": "squaredcos_cap_v2"
    }
    meanings = {ours: theirs for theirs, ours in MEANINGS.items()}
    name, meaning = schedule.get("name", "linear"), diffusion["parameterization"]
    spacing = diffusion["spacing"]
    if name not in names:
        raise ValueError(f"diffusion.schedule.name={name!r}: diffusers has {', '.join(names)}")
    if meaning not in meanings:
        raise ValueError(
            f"diffusion.parameterization={meaning!r}: diffusers has {', '.join(meanings)}"
        )
    # CompVis' grid is equal to diffusers' "leading".
    grids = {"compat": ("leading", "first")} | {known: (known, "clean") for known in SPACINGS}
    if spacing not in grids:
        raise ValueError(f"diffusion.spacing={spacing!r}: diffusers has {', '.join(grids)}")
    spacing, end = grids[spacing]
    return dict(
        _class_name="LCMScheduler" if spacing == "lcm" else "DDIMScheduler",
        _diffusers_version=VERSION,
        num_train_timesteps=schedule.get("timesteps", 1000),
        beta_start=schedule.get("start", 1e-4),
        beta_end=schedule.get("end", 2e-2),
        beta_schedule=names[name],
        prediction_type=meanings[meaning],
        rescale_betas_zero_snr=schedule.get("zero_terminal_snr", False),
        timestep_spacing="leading" if spacing == "lcm" else spacing,
        steps_offset=diffusion.get("offset", 1),
        set_alpha_to_one=(diffusion.get("end") or end) == "clean",
        clip_sample=False,
        trained_betas=None,
    )
