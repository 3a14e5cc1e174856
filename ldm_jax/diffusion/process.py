"""The diffusion process of a model: section `diffusion` of its config."""

import dataclasses
from typing import Any

from ldm_jax.diffusion.grids import COMPVIS, NOISE, Grid, sampling_grid
from ldm_jax.diffusion.parameterization import Denoiser, Network, make_denoiser
from ldm_jax.diffusion.schedule import FlowSchedule, Schedule, make_schedule


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """The noise schedule, the meaning of the network's output, and the model's own grid.

    Attributes:
      schedule: in a config, the arguments of `make_schedule`.
      parameterization: one of `parameterization.KINDS`.
      sigma_data: of the parameterization "edm".
      spacing, offset, end: of the model's own grid, see `grids.sampling_grid`.

    Raises ValueError for the parameterization "meanflow" on a schedule that is no flow.
    """

    schedule: Schedule
    parameterization: str
    sigma_data: float = 0.5
    spacing: str = "trailing"
    offset: int = 1
    end: str | None = None

    def __post_init__(self):
        if self.spans and not isinstance(self.schedule, FlowSchedule):
            raise ValueError(
                "parameterization 'meanflow' is of straight paths: use schedule.name='flow'"
            )

    @property
    def spans(self) -> bool:
        """Whether the network takes the time over which it predicts the mean, t − r, beside t."""
        return self.parameterization == "meanflow"

    @classmethod
    def from_config(cls, section: dict[str, Any]) -> "Diffusion":
        return cls(**dict(section) | dict(schedule=make_schedule(**section["schedule"])))

    def denoiser(self, network: Network) -> Denoiser:
        """`denoise(x, level) -> Prediction` from `network(x, t)`."""
        return make_denoiser(self.parameterization, network, self.sigma_data)

    def time_spacing(self, spacing: str | None) -> str:
        """A spacing of time: the given one or, if it is of noise or None, the model's own."""
        return self.spacing if spacing in (None, *NOISE) else spacing

    def grid(
        self, steps: int, family: str, spacing: str | None = None, shift: float | None = None
    ) -> Grid:
        """The levels of a run of `steps` steps; `spacing` None: the model's own."""
        spacing = spacing or self.spacing
        foreign = spacing in COMPVIS and spacing != self.spacing
        return sampling_grid(
            self.schedule,
            steps,
            spacing,
            family=family,
            offset=self.offset,
            end=None if foreign else self.end,
            shift=1.0 if shift is None else shift,
            base=self.spacing,
        )
