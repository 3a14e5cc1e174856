"""The noise levels that a sampler visits, from noisy to clean; not a training draw of timesteps.

Two kinds of grid. A spacing of time ("trailing", …) picks timesteps and takes their levels; a
spacing of noise ("karras", "exponential") picks σ/α and looks up the time that belongs to it.
"""

import numpy as np

from ldm_jax.diffusion.schedule import DiscreteSchedule, EDMSchedule, FlowSchedule, Level, Schedule

CLEAN = Level(np.zeros(1), np.ones(1), np.zeros(1))
KARRAS_RHO = 7.0  # Karras et al. 2022, §3: errors spread evenly over the steps
LCM_TEACHER_STEPS = 50  # the grid on which latent consistency models are distilled


def sampling_levels(
    schedule: Schedule,
    steps: int,
    spacing: str = "trailing",
    shift: float = 1.0,
    offset: int | None = None,
    end: str | None = None,
) -> Level:
    """`steps` + 1 levels, float64: where each step starts, and, last, where sampling ends.

    The end is clean, except on CompVis' own grids, which stop at the table's first entry; `end`
    "clean" or "first" (diffusers' `set_alpha_to_one` and its contrary) chooses otherwise.

    Spacings of time, for discrete schedules; for flow ones "trailing" and "linspace":
      trailing: starts at the last timestep (Lin et al. 2023). The default.
      leading: ends at the second; linspace: takes both ends.
      quad: CompVis' DDIM with `ddim_discretize="quad"`, each timestep once.
      compat: CompVis' DDIM, every T // S-th timestep plus one; its number of steps may be larger.
      dpm: CompVis' DPM-Solver, real timesteps from T − 1 to 0.
      lcm: of a latent consistency model (Luo et al. 2023); turbo: of SDXL-Turbo, tenths of T.
    Spacings of noise, between the schedule's own ends:
      karras: Karras et al. 2022, eq. 5, ρ = 7. exponential: even in log σ.

    Args:
      steps: how many, at least 1, and for discrete schedules at most T.
      shift: of a flow schedule, t ← s·t/(1 + (s − 1)·t) (Esser et al. 2024, eq. 23).
      offset: of "leading", in place of our own: whole strides T // S, and so many timesteps added
        (diffusers' `steps_offset`).

    Raises:
      ValueError: steps out of range, a spacing that is unknown or not for this schedule.
    """
    largest = schedule.timesteps if isinstance(schedule, DiscreteSchedule) else 100_000
    if not 1 <= steps <= largest:
        raise ValueError(f"steps={steps}: this model takes 1 to {largest} steps")
    spacings = [name for name, (kinds, _) in SPACINGS.items() if isinstance(schedule, kinds)]
    if spacing not in spacings:
        raise ValueError(f"spacing {spacing!r}: for this schedule choose {', '.join(spacings)}")
    end = end or ("first" if spacing in ("compat", "quad", "dpm") else "clean")
    last_level = schedule.at(np.zeros(1)) if end == "first" else CLEAN
    if spacing == "leading" and offset is not None:
        stride = schedule.timesteps // steps
        grid = np.arange(steps)[::-1] * stride + offset
        levels = schedule.at(np.minimum(grid, schedule.timesteps - 1))
    else:
        levels = SPACINGS[spacing][1](schedule, steps)
    if isinstance(schedule, FlowSchedule) and shift != 1.0:
        t = levels.t / schedule.timesteps
        levels = schedule.at(schedule.timesteps * shift * t / (1.0 + (shift - 1.0) * t))
    return Level(*(np.append(start, last) for start, last in zip(levels, last_level, strict=True)))


def _trailing(schedule, steps):
    t = schedule.timesteps - np.arange(steps) * schedule.timesteps / steps
    return schedule.at(np.rint(t) - 1 if isinstance(schedule, DiscreteSchedule) else t)


def _leading(schedule, steps):
    shift = 1 if steps < schedule.timesteps else 0  # a full grid has no room for it
    return schedule.at(np.arange(steps)[::-1] * schedule.timesteps // steps + shift)


def _linspace(schedule, steps):
    if isinstance(schedule, FlowSchedule):
        return schedule.at(np.linspace(schedule.timesteps, 1.0, steps))
    return schedule.at(np.rint(np.linspace(schedule.timesteps - 1, 0, steps)))


def _quad(schedule, steps):
    grid = (np.linspace(0, np.sqrt(schedule.timesteps * 0.8), steps) ** 2).astype(int) + 1
    return schedule.at(np.unique(np.minimum(grid, schedule.timesteps - 1))[::-1])


def _compat(schedule, steps):
    grid = np.arange(0, schedule.timesteps, schedule.timesteps // steps)[::-1] + 1
    if grid[0] >= schedule.timesteps:
        raise ValueError(
            f"steps={steps}: LDM's own grid reaches timestep {grid[0]} of {schedule.timesteps}; "
            "choose another count or spacing"
        )
    return schedule.at(grid)


def _dpm(schedule, steps):
    return schedule.at(np.linspace(schedule.timesteps - 1, 0, steps + 1)[:-1])


def _lcm(schedule, steps):
    count = min(LCM_TEACHER_STEPS, schedule.timesteps)
    if steps > count:
        raise ValueError(f"steps={steps}: spacing 'lcm' has {count} timesteps")
    teacher = np.arange(1, count + 1) * (schedule.timesteps // count) - 1
    return schedule.at(teacher[::-1][np.arange(steps) * count // steps])


def _turbo(schedule, steps):
    if steps > 10:
        raise ValueError(f"steps={steps}: spacing 'turbo' has 10 timesteps")
    return schedule.at(schedule.timesteps - 1 - np.arange(steps) * (schedule.timesteps // 10))


def _noise_range(schedule: Schedule) -> tuple[float, float]:
    """The largest and smallest σ/α."""
    if isinstance(schedule, EDMSchedule):
        return schedule.sigma_max, schedule.sigma_min
    smallest, largest = schedule.at(np.array([0, schedule.timesteps - 1])).ratio
    if not np.isfinite(largest):
        raise ValueError(
            "a spacing of noise needs some signal at the last timestep, and this schedule has "
            "none; choose a spacing of time"
        )
    return largest, smallest


def _karras(schedule, steps):
    largest, smallest = (value ** (1.0 / KARRAS_RHO) for value in _noise_range(schedule))
    return schedule.from_ratio(np.linspace(largest, smallest, steps) ** KARRAS_RHO)


def _exponential(schedule, steps):
    return schedule.from_ratio(np.geomspace(*_noise_range(schedule), steps))


_TABLE, _TIMED = DiscreteSchedule, DiscreteSchedule | FlowSchedule
SPACINGS = {
    "trailing": (_TIMED, _trailing),
    "linspace": (_TIMED, _linspace),
    "leading": (_TABLE, _leading),
    "quad": (_TABLE, _quad),
    "compat": (_TABLE, _compat),
    "dpm": (_TABLE, _dpm),
    "lcm": (_TABLE, _lcm),
    "turbo": (_TABLE, _turbo),
    "karras": (DiscreteSchedule | EDMSchedule, _karras),
    "exponential": (DiscreteSchedule | EDMSchedule, _exponential),
}
