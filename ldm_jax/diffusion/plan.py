"""A caller's options, `Guidance` and `Sampling`, and the tables that are made from them.

Each field's metadata holds its flag in `sample.py` and a description: the flags and the tables of
docs/samplers.md are made from them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.diffusion.cache import check_cache, refreshed
from ldm_jax.diffusion.checks import check_finite, check_number
from ldm_jax.diffusion.editing import skipped_steps
from ldm_jax.diffusion.multistep import Table
from ldm_jax.diffusion.process import Diffusion
from ldm_jax.diffusion.samplers import SAMPLERS, get_sampler, make_table
from ldm_jax.diffusion.schedule import DiscreteSchedule, EDMSchedule, Level


def option(default: Any, flag: str, help: str, example: str, kind: type = float) -> Any:
    """A field with its flag's name, a description, an example, and the type of its values: float,
    int, str, or tuple (numbers with commas between)."""
    about = {"flag": flag, "help": help, "example": example, "kind": kind}
    return dataclasses.field(default=default, metadata=about)


def flags(cls: type) -> dict[str, dataclasses.Field]:
    """The fields of `Guidance` or `Sampling` that flags set, by flag."""
    fields = dataclasses.fields(cls)
    return {field.metadata["flag"]: field for field in fields if field.metadata}


def from_flags(cls: type, values: dict[str, Any]) -> Any:
    """A `Guidance` or `Sampling` from the values of flags, by flag, without those that are None."""
    given = {name: values.get(name) for name in flags(cls)}
    return cls(**{flags(cls)[name].name: v for name, v in given.items() if v is not None})


METHODS = ("cfg", "cfg++", "apg", "cfg-zero*")
FIRST_ORDER = ("ddim", "ddpm", "euler", "euler_ancestral", "flow_euler")  # for "cfg++"
# By flag: the field of `Guidance`, and the method that it is of.
METHOD_OPTIONS = {
    "apg_parallel": ("parallel", "apg"),
    "apg_norm": ("norm", "apg"),
    "zero_steps": ("zero_steps", "cfg-zero*"),
}


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How conditions guide: uncond + scale·(cond − uncond), and its variants.

    Attributes:
      scale: one number, or one for each step; 1 is the conditional model alone, at half the cost.
        None: the model's own.
      interval: (low, high), shares of the model's time, 0 clean and 1 noise, outside of which there
        is no guidance (Kynkäänniemi et al. 2024).
      rescale: 0…1, against over-exposure (Lin et al. 2023, eq. 16).
      threshold: percentile in (0, 1] of dynamic thresholding (Saharia et al. 2022); None: off.
      weights: one for each prompt; all prompts make one picture (Liu et al. 2022, eq. 11).
      method: one of `METHODS`: "cfg"; "cfg++" (Chung et al. 2024, scale 0…1); "apg" (Sadat et al.
        2024, without momentum); "cfg-zero*" (Fan et al. 2025).
      parallel: of "apg": the share of the difference along the conditional prediction that stays.
      norm: of "apg": the longest difference of x0, the norm of one picture's latents.
      zero_steps: of "cfg-zero*" on flow models: in so many first steps the velocity is zero.
      weak: a worse pipeline of the same latents, whose prediction replaces the unconditional one
        (autoguidance, Karras et al. 2024).
      negative: values of conditions other than the prompt for the negative side of guidance, by
        entry, such as "crop" or "aesthetic_score".

    Raises:
      ValueError: a number that is not finite or out of its range.
    """

    scale: float | Sequence[float] | None = option(
        None, "guidance", "uncond + G·(cond − uncond); 1 is the plain model, at half the cost", "3"
    )
    interval: tuple[float, float] | None = option(
        None,
        "guidance_interval",
        "LOW,HIGH: guidance only while the share of noise is in this range; other steps cost half",
        "0.2,0.8",
        tuple,
    )
    rescale: float = option(
        0.0, "guidance_rescale", "0…1, against over-exposure by strong guidance", "0.7"
    )
    threshold: float | None = option(
        None,
        "threshold",
        "percentile in 0…1 of dynamic thresholding; made for pixels, it flattens latents",
        "0.995",
    )
    weights: Sequence[float] | None = option(
        None, "compose", "a weight for each prompt: all prompts make one picture", "1,0.5", tuple
    )
    method: str = option(
        "cfg", "guidance_method", "cfg, cfg++ (scale 0…1), apg or cfg-zero*", "apg", str
    )
    parallel: float = option(
        0.0, "apg_parallel", "share of apg's difference along the prediction that stays", "0.5"
    )
    norm: float = option(np.inf, "apg_norm", "longest difference of apg", "15")
    zero_steps: float = option(
        0, "zero_steps", "first steps of cfg-zero* with velocity zero, of flow models", "1"
    )
    weak: Any = option(
        None, "weak", "a worse model of the same latents, for autoguidance", "runs/early", str
    )
    negative: dict[str, Any] | None = None

    def __post_init__(self):
        check_finite(guidance=self.scale, guidance_interval=self.interval, compose=self.weights)
        check_number(guidance_rescale=self.rescale, threshold=self.threshold)
        self._check_method()
        check_finite(**{f"negative {k!r}": v for k, v in (self.negative or {}).items()})
        if self.weights is not None and np.ndim(self.weights) != 1:
            raise ValueError(f"compose={self.weights!r}: a list of one weight for each prompt")
        if self.weak is not None and (self.weights is not None or self.rescale or self.negative):
            raise ValueError(
                "weak: the worse model replaces what guidance leads away from, so it takes no "
                "weights (compose), rescale or negative beside it"
            )
        if self.weak is not None and not hasattr(self.weak, "model"):
            raise ValueError(f"weak={self.weak!r}: must be a pipeline, as load returns one")
        if not 0.0 <= self.rescale <= 1.0:
            raise ValueError(f"guidance_rescale={self.rescale:g}: must lie in 0…1")
        if self.threshold is not None and not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold={self.threshold:g}: must lie above 0 and up to 1")
        if self.interval is None:
            return
        if np.shape(self.interval) != (2,):
            raise ValueError(f"guidance_interval={self.interval}: two numbers, low and high")
        low, high = self.interval
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(
                f"guidance_interval={low:g},{high:g}: must lie in 0…1, 0 clean and 1 noise"
            )

    def _check_method(self):
        if self.method not in METHODS:
            raise ValueError(f"guidance_method={self.method!r}: choose one of {', '.join(METHODS)}")
        if self.method != "cfg" and (self.weak is not None or self.weights is not None):
            raise ValueError(
                f"guidance_method={self.method!r} is of one prompt and one model: it takes no "
                "weights (compose) or weak beside it"
            )
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for flag, (name, method) in METHOD_OPTIONS.items():
            value = getattr(self, name)
            if value == defaults[name]:
                continue
            check_number(**{flag: value})
            if self.method != method:
                raise ValueError(f"{flag} is of guidance_method={method!r}, not {self.method!r}")
            if value < 0 or (name == "zero_steps" and value != int(value)):
                whole = "whole and " * (name == "zero_steps")
                raise ValueError(f"{flag}={value:g}: must be {whole}not negative")
        if self.method == "cfg++" and self.interval is not None:
            raise ValueError("guidance_interval: cfg++ guides at every step")
        if self.method == "cfg++" and self.scale is not None:
            scale = np.asarray(self.scale)
            if scale.min() < 0.0 or scale.max() > 1.0:
                raise ValueError(f"guidance={self.scale}: of cfg++ it must lie in 0…1")

    def check_alone(self, distilled: bool, negative: bool) -> None:
        """Raises ValueError for what needs an unconditional prediction, if there is none."""
        own = self.weights is not None or self.rescale or self.method != "cfg"
        if (distilled or self.weak is not None) and (negative or own):
            raise ValueError(
                "with weak, and on models distilled with guidance, there is no unconditional "
                "prediction: no negative_prompt, weights, rescale or method"
            )

    @classmethod
    def of(cls, asked: "Guidance | float | Sequence[float] | None", own: float) -> "Guidance":
        """`asked` as a complete `Guidance`; `own` is the model's own scale."""
        asked = asked if isinstance(asked, cls) else cls(asked)
        return dataclasses.replace(asked, scale=own) if asked.scale is None else asked

    def scales(self, steps: int, share: np.ndarray) -> np.ndarray:
        """(S,) scale of every step, 1 outside of the interval; `share` (S,) is of the noise.

        Raises ValueError for another number of scales than of steps.
        """
        scales = np.asarray(self.scale, np.float64)
        if scales.ndim and scales.shape != (steps,):
            raise ValueError(
                f"guidance of shape {scales.shape}: one number, or one for {steps} steps"
            )
        scales = np.broadcast_to(scales, (steps,))
        if self.interval is None:
            return scales
        low, high = self.interval
        return np.where((share >= low) & (share <= high), scales, 1.0)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which sampler, on which grid, with what options.

    Attributes:
      sampler: one of `samplers.SAMPLERS`; None: the model's own.
      spacing: of the steps, see `grids.sampling_grid`; None: the model's own.
      shift: of flow models: more steps where there is more noise.
      eta: of samplers that draw noise, 0: none, 1: as much as DDPM.
      churn, churn_min, churn_max, churn_scale: of "euler" and "heun": S_churn, S_tmin, S_tmax and
        S_noise of Karras et al. 2022, algorithm 2.
      cache_interval: every so many steps run the whole UNet, the others its outermost levels alone,
        with features that were kept (DeepCache, Ma et al. 2023). 1: no cache.
      cache_branch: the number of the skip that the kept features meet, 0 the outermost.
      Options that are None are the sampler's own.

    Raises:
      ValueError: an unknown sampler, an option that it does not have, or a number that is not
        finite or negative.
    """

    sampler: str | None = option(
        None, "sampler", "the method; default: the model's own", "dpmpp_2m", str
    )
    spacing: str | None = option(
        None, "spacing", "the grid of its steps; default: the model's own", "karras", str
    )
    shift: float | None = option(
        None, "shift", "of flow models: t ← s·t/(1 + (s − 1)·t), more steps at more noise", "3"
    )
    eta: float | None = option(None, "eta", "0: draws no noise; 1: as much as DDPM", "1")
    churn: float | None = option(None, "churn", "noise added by euler and heun", "40")
    churn_min: float | None = option(None, "churn_min", "lowest σ/α with churn", "0.05")
    churn_max: float | None = option(None, "churn_max", "highest σ/α with churn", "50")
    churn_scale: float | None = option(None, "churn_scale", "standard deviation of churn", "1.003")
    cache_interval: int = option(
        1, "cache_interval", "DeepCache: every so many steps run the whole UNet", "3", int
    )
    cache_branch: int = option(
        0,
        "cache_branch",
        "DeepCache: the skip up to which every step runs, 0 the outermost",
        "1",
        int,
    )

    def __post_init__(self):
        taken = {} if self.sampler is None else get_sampler(self.sampler).options
        check_number(shift=self.shift)
        evaluations = 1 if self.sampler is None else SAMPLERS[self.sampler].evaluations
        check_cache(self.cache_interval, self.cache_branch, self.sampler, evaluations)
        for name, value in self.options.items():
            if self.sampler is not None and name not in taken:
                raise ValueError(
                    f"sampler {self.sampler!r} has no {name}; its options: "
                    f"{', '.join(taken) or 'none'}"
                )
            if not (name == "churn_max" and isinstance(value, float) and value == np.inf):
                check_number(**{name: value})
            if value < 0.0:
                raise ValueError(f"{name}={value:g}: must not be negative")

    @classmethod
    def of(cls, asked: "Sampling | str | None", own: dict[str, Any]) -> "Sampling":
        """`asked` as a complete `Sampling`; `own` is the section `sampling` of the model's config.

        The model's own η is used only with its own sampler, its own spacing of noise with all
        samplers that have one in diffusers.
        """
        asked = asked if isinstance(asked, cls) else cls(asked)
        if asked.sampler is None:
            name, eta = own.get("sampler", "ddim"), own.get("eta") or None
            eta = eta if asked.eta is None and "eta" in get_sampler(name).options else asked.eta
            asked = dataclasses.replace(asked, sampler=name, eta=eta)
        if asked.spacing is None and SAMPLERS[asked.sampler].family in ("euler", "dpm"):
            asked = dataclasses.replace(asked, spacing=own.get("spacing"))
        return asked

    @property
    def options(self) -> dict[str, float]:
        """The sampler's options that are set."""
        names = ("eta", "churn", "churn_min", "churn_max", "churn_scale")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class GuidanceTable(NamedTuple):
    """Guidance of every step: the scale (S,), the weights of several conditions (S, K), the amount
    of rescaling (S,), and whether it is on (S,), None if it is on in all steps. Of other methods:
    `parallel` and `norm` (S,) of "apg", and of "cfg-zero*" 0 where the output is zero, else 1."""

    scale: np.ndarray
    weights: np.ndarray
    rescale: np.ndarray
    active: np.ndarray | None
    projection: tuple[np.ndarray, np.ndarray] | None = None
    kept: np.ndarray | None = None


class Run(NamedTuple):
    """The traced inputs of a run; their structure, not their numbers, determines the program.

    The run starts from `start.alpha` times the known latents, if there are any, plus `start.sigma`
    times the noise. `percentile` is that of dynamic thresholding, None: off.
    """

    table: Table
    guidance: GuidanceTable | None
    start: Level
    percentile: float | None


def plan(
    diffusion: Diffusion,
    steps: int,
    sampling: Sampling | str = "ddim",
    guidance: Guidance | float = 1.0,
    *,
    strength: float | None = None,
    masked: bool = False,
) -> Run:
    """The tables of a run, on the host. Guidance of 1 at every step is left out.

    Args:
      strength: of an edit of known latents, 0…1, the share of the steps that is run; None: no edit.
      masked: whether the edit redraws a part only. With strength 1 the noise then contains no trace
        of what was there.

    Raises:
      ValueError: steps, a spacing, an option or a number of scales that this model does not allow.
    """
    sampling, guidance = Sampling.of(sampling, {}), Guidance.of(guidance, 1.0)
    schedule, family = diffusion.schedule, SAMPLERS[sampling.sampler].family
    if SAMPLERS[sampling.sampler].spans and not diffusion.spans:
        raise ValueError(
            f"sampler {sampling.sampler!r} is of models with parameterization 'meanflow'; this one "
            f"has {diffusion.parameterization!r}"
        )
    grid = diffusion.grid(steps, family, sampling.spacing, sampling.shift)
    steps = len(grid.here.t)  # CompVis' own spacings may have more or fewer than asked for
    skip = None if strength is None else skipped_steps(steps, strength)
    trace = strength is not None and not (masked and skip == 0)
    table = make_table(sampling.sampler, schedule, grid, skip, **sampling.options)

    start = Level(*(np.float32(v[skip or 0]) for v in grid.levels))
    if not trace:
        # diffusers' schedulers of this family start these grids from σ/α times the noise, all
        # others from noise of the variance that the noised latents have.
        spread = family == "euler" and isinstance(schedule, DiscreteSchedule)
        spread = spread and diffusion.time_spacing(sampling.spacing) in ("linspace", "trailing")
        sigma = start.sigma if spread else np.hypot(start.alpha, start.sigma)
        start = start._replace(alpha=np.float32(0.0), sigma=np.float32(sigma))

    is_edm = isinstance(schedule, EDMSchedule)
    longest = schedule.sigma_max if is_edm else schedule.timesteps
    scale = guidance.scales(steps, grid.here.t / longest)
    weights = np.ones(1) if guidance.weights is None else np.asarray(guidance.weights)
    percentile, on = guidance.threshold, scale != 1.0
    if guidance.method == "cfg++":
        scale, on = _plus_plus(scale, sampling.sampler, table, grid.after), np.full(steps, True)
    if guidance.zero_steps and diffusion.parameterization != "flow":
        raise ValueError("zero_steps: only the velocity of a flow model may be zero")
    zero_star = guidance.method == "cfg-zero*"
    on = on | (zero_star & (np.arange(steps) < guidance.zero_steps))
    active = None if len(weights) > 1 or on.all() else on
    if sampling.cache_interval > 1:
        interval = sampling.cache_interval
        table["refresh"] = refreshed(steps, interval, skip or 0, active)
    if len(weights) == 1 and not on.any():
        return Run(table, None, start, percentile)
    steps_of = GuidanceTable(
        scale=np.float32(scale),
        weights=np.tile(np.float32(weights), (steps, 1)),
        rescale=np.full(steps, guidance.rescale, np.float32),
        active=active,
    )
    if guidance.method == "apg":
        both = (guidance.parallel, guidance.norm)
        steps_of = steps_of._replace(
            projection=tuple(np.full(steps, value, np.float32) for value in both)
        )
    elif zero_star:
        kept = np.arange(steps) >= guidance.zero_steps
        steps_of = steps_of._replace(kept=np.float32(kept))
    return Run(table, steps_of, start, percentile)


def _plus_plus(scale: np.ndarray, sampler: str, table: Table, after: Level) -> np.ndarray:
    """The scales with which guidance is CFG++ (Chung et al. 2024, arXiv 2406.08070, algorithm 2).

    CFG++ goes on to α'·x0 + σ'·ε with the guided x0 and the unconditional ε. A step of first order
    is a·x + b·x0 with x = α·x0 + σ·ε of the unconditional prediction, so a scale of λ·α'/b is the
    same.
    """
    if sampler not in FIRST_ORDER:
        raise ValueError(
            f"cfg++ is of samplers of first order: choose one of {', '.join(FIRST_ORDER)}"
        )
    return scale * after.alpha / table["b"][:, 0]
