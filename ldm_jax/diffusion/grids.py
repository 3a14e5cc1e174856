"""The noise levels that a sampler visits, from noisy to clean; not the random times of training.

There are two kinds of grids. A spacing of time ("trailing", …) chooses timesteps and uses their
levels; a spacing of noise ("karras", "exponential") chooses σ/α and computes the times.

diffusers' schedulers compute one spacing in different ways, and so does this module, by the
`family` of a sampler:

  ddim   a step of "leading", "linspace" and "trailing" goes T // S timesteps down, wherever the
         next one starts; below the table it ends at the level that `end` names.
  plain  each step ends where the next one starts, and the last one is clean.
  euler  as plain. "linspace" does not round; karras and exponential lie between the ends of the
         model's own spacing of time.
  dpm    as plain. "leading" and "linspace" are S + 1 timesteps without the last; the times of
         karras and exponential are integers.
"""

from typing import NamedTuple

import numpy as np

from ldm_jax.diffusion.schedule import DiscreteSchedule, EDMSchedule, FlowSchedule, Level, Schedule

CLEAN = Level(np.zeros(1), np.ones(1), np.zeros(1))
KARRAS_RHO = 7.0  # Karras et al. 2022, §3: spreads the errors evenly over the steps
LCM_TEACHER_STEPS = 50  # the grid on which latent consistency models are distilled
COMPVIS = ("compat", "quad", "dpm")  # spacings of CompVis' samplers, which end at the first entry


class Grid(NamedTuple):
    """The levels at which each of S steps starts, `here`, and ends, `after`: float64 (S,)."""

    here: Level
    after: Level

    @classmethod
    def chain(cls, levels: Level) -> "Grid":
        """Steps from each of S + 1 levels to the next."""
        return cls(*(Level(*(v[part] for v in levels)) for part in (np.s_[:-1], np.s_[1:])))

    def rows(self, part: slice) -> "Grid":
        """Some of the steps."""
        return Grid(*(Level(*(v[part] for v in level)) for level in self))

    @property
    def levels(self) -> Level:
        """(S + 1,): the start of each step, and the end of the last one."""
        return Level(*(np.append(v, e[-1]) for v, e in zip(self.here, self.after, strict=True)))


def sampling_grid(
    schedule: Schedule,
    steps: int,
    spacing: str = "trailing",
    *,
    family: str = "plain",
    offset: int = 1,
    end: str | None = None,
    shift: float = 1.0,
    base: str | None = None,
) -> Grid:
    """The levels of `steps` steps.

    Spacings of time, for discrete schedules; for flow ones "trailing" and "linspace":
      trailing: starts at the last timestep (Lin et al. 2023). The default.
      leading: every T // S-th timestep, plus `offset`; linspace: includes both ends.
      quad: CompVis' DDIM with `ddim_discretize="quad"`, each timestep once.
      compat: CompVis' DDIM, every T // S-th timestep plus one; its number of steps may be larger.
      dpm: CompVis' DPM-Solver, real timesteps from T − 1 to 0.
      lcm: of a latent consistency model (Luo et al. 2023); turbo: of SDXL-Turbo, tenths of T.
    Spacings of noise, between the schedule's ends, or those of `base`:
      karras: Karras et al. 2022, eq. 5, ρ = 7. exponential: even in log σ.

    Args:
      steps: how many, at least 1, and for discrete schedules at most T.
      family: "ddim", "plain", "euler" or "dpm", see above.
      offset: timesteps added to "leading" (diffusers' `steps_offset`), at most up to T − 1.
      end: of the family "ddim" and spacings of time: "clean", or "first", the table's first entry
        (diffusers' `set_alpha_to_one`, true or false). None: clean, but "first" for `COMPVIS`.
      shift: of a flow schedule, t ← s·t/(1 + (s − 1)·t) (Esser et al. 2024, eq. 23).
      base: of the family "euler": the spacing of time whose ends spacings of noise use.

    Raises:
      ValueError: steps out of range, a spacing that is unknown or not for this schedule, a grid
        that does not descend, a shift for a schedule without, or one not above 0.
    """
    discrete = isinstance(schedule, DiscreteSchedule)
    largest = schedule.timesteps if discrete else 100_000
    if not 1 <= steps <= largest:
        raise ValueError(f"steps={steps}: this model takes 1 to {largest} steps")
    spacings = [name for name, (kinds, _) in SPACINGS.items() if isinstance(schedule, kinds)]
    if spacing not in spacings:
        raise ValueError(f"spacing {spacing!r}: for this schedule choose {', '.join(spacings)}")
    if spacing in NOISE:
        within = None
        if family == "euler" and discrete and base not in (None, *NOISE):
            within = sampling_grid(schedule, steps, base, family=family, offset=offset).here
        ratio = NOISE[spacing](*_noise_range(schedule, within), steps)
        here = schedule.from_ratio(ratio)
        if family == "dpm" and discrete:
            here = here._replace(t=np.rint(here.t) if spacing == "karras" else np.floor(here.t))
    elif spacing == "leading":
        here = _leading(schedule, steps, family, offset)
    else:
        here = SPACINGS[spacing][1](schedule, steps, family)
    if shift != 1.0:
        if not isinstance(schedule, FlowSchedule) or not shift > 0.0:
            raise ValueError(f"shift={shift:g}: must be above 0, and is for flow models alone")
        t = here.t / schedule.timesteps
        here = schedule.at(schedule.timesteps * shift * t / (1.0 + (shift - 1.0) * t))

    if family == "ddim" and spacing not in NOISE:
        first = (end or ("first" if spacing in COMPVIS else "clean")) == "first"
    else:
        first = spacing == "dpm"
    last = schedule.at(np.zeros(1)) if first else CLEAN
    grid = Grid.chain(Level(*(np.append(v, e) for v, e in zip(here, last, strict=True))))
    if family == "ddim" and discrete and spacing in ("leading", "linspace", "trailing"):
        down = here.t - schedule.timesteps // steps
        after = schedule.at(np.maximum(down, 0.0))
        after = Level(*(np.where(down >= 0.0, v, e) for v, e in zip(after, last, strict=True)))
        grid = grid._replace(after=after)
    if (here.alpha == 0.0).sum() > 1:
        raise ValueError(
            f"{steps} steps of spacing {spacing!r} visit several levels without signal: choose "
            "fewer steps, or another spacing"
        )
    with np.errstate(invalid="ignore"):
        down = np.diff(grid.levels.ratio) < 0.0
    if family != "ddim" and not down.all():
        raise ValueError(
            f"{steps} steps of spacing {spacing!r} visit a noise level twice, in step "
            f"{1 + int(np.argmin(down))}: choose fewer steps, or another spacing"
        )
    return grid


def _trailing(schedule, steps, family):
    last = schedule.timesteps
    if not isinstance(schedule, DiscreteSchedule):
        return schedule.at(last - np.arange(steps) * last / steps)
    # np.arange, as in diffusers: the last bit decides how halves are rounded.
    return schedule.at(np.rint(np.arange(last, 0, -last / steps)[:steps]) - 1)


def _skipped(schedule, steps, family):
    """The number of timesteps that "dpm" leaves out at the end; 0 if all T are used."""
    return 1 if family == "dpm" and steps < schedule.timesteps else 0


def _leading(schedule, steps, family, offset=1):
    skipped = _skipped(schedule, steps, family)
    stride = schedule.timesteps // (steps + skipped)
    grid = (np.arange(steps)[::-1] + skipped) * stride + offset
    return schedule.at(grid - max(0, grid[0] - schedule.timesteps + 1))


def _linspace(schedule, steps, family):
    if isinstance(schedule, FlowSchedule):
        return schedule.at(np.linspace(schedule.timesteps, 1.0, steps))
    last = schedule.timesteps - 1
    t = np.linspace(0, last, steps + _skipped(schedule, steps, family))[::-1][:steps]
    if family != "euler":
        return schedule.at(np.rint(t))
    # Lines of σ/α between the table's entries, not of log α.
    table = schedule.at(np.arange(schedule.timesteps)).ratio
    with np.errstate(invalid="ignore"):
        ratio = np.interp(t, np.arange(schedule.timesteps), table)
    known = np.isfinite(ratio)
    lines = schedule.from_ratio(np.where(known, ratio, 1.0))
    levels = zip(lines, schedule.at(t), strict=True)
    return Level(*(np.where(known, line, entry) for line, entry in levels))._replace(t=t)


def _quad(schedule, steps, family):
    grid = (np.linspace(0, np.sqrt(schedule.timesteps * 0.8), steps) ** 2).astype(int) + 1
    return schedule.at(np.unique(np.minimum(grid, schedule.timesteps - 1))[::-1])


def _compat(schedule, steps, family):
    grid = np.arange(0, schedule.timesteps, schedule.timesteps // steps)[::-1] + 1
    if grid[0] >= schedule.timesteps:
        raise ValueError(
            f"steps={steps}: LDM's own grid reaches timestep {grid[0]} of {schedule.timesteps}; "
            "choose another count or spacing"
        )
    return schedule.at(grid)


def _dpm(schedule, steps, family):
    return schedule.at(np.linspace(schedule.timesteps - 1, 0, steps + 1)[:-1])


def _lcm(schedule, steps, family):
    count = min(LCM_TEACHER_STEPS, schedule.timesteps)
    if steps > count:
        raise ValueError(f"steps={steps}: spacing 'lcm' has {count} timesteps")
    teacher = np.arange(1, count + 1) * (schedule.timesteps // count) - 1
    return schedule.at(teacher[::-1][np.arange(steps) * count // steps])


def _turbo(schedule, steps, family):
    if steps > 10:
        raise ValueError(f"steps={steps}: spacing 'turbo' has 10 timesteps")
    return schedule.at(schedule.timesteps - 1 - np.arange(steps) * (schedule.timesteps // 10))


def _noise_range(schedule: Schedule, within: Level | None) -> tuple[float, float]:
    """The largest and smallest σ/α, of a schedule or of levels."""
    if isinstance(schedule, EDMSchedule):
        return schedule.sigma_max, schedule.sigma_min
    within = schedule.at(np.array([schedule.timesteps - 1, 0])) if within is None else within
    largest, smallest = within.ratio[[0, -1]]
    if not np.isfinite(largest):
        raise ValueError(
            "a spacing of noise needs some signal at the last timestep, and this schedule has "
            "none; choose a spacing of time"
        )
    return largest, smallest


def _karras(largest, smallest, steps):
    root = 1.0 / KARRAS_RHO
    return np.linspace(largest**root, smallest**root, steps) ** KARRAS_RHO


NOISE = {"karras": _karras, "exponential": np.geomspace}
_TABLE, _TIMED, _NOISY = (
    DiscreteSchedule,
    DiscreteSchedule | FlowSchedule,
    DiscreteSchedule | EDMSchedule,
)
SPACINGS = {
    "trailing": (_TIMED, _trailing),
    "linspace": (_TIMED, _linspace),
    "leading": (_TABLE, _leading),
    "quad": (_TABLE, _quad),
    "compat": (_TABLE, _compat),
    "dpm": (_TABLE, _dpm),
    "lcm": (_TABLE, _lcm),
    "turbo": (_TABLE, _turbo),
} | {name: (_NOISY, None) for name in NOISE}
