"""Snapshots of a run's power-function averages, and the averages of other widths made of them.

A run with `train.ema_sigma_rel` writes one at each checkpoint, `averages/STEP.safetensors`, and
keeps them all. Tensors are named by average and path: "sigma_rel_0.05/unet/out_2/kernel".
"""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.interop.files import Tensors, open_state, write_safetensors
from ldm_jax.interop.native import exported_file, save_model
from ldm_jax.interop.opening import open_any
from ldm_jax.runtime.mesh import to_host
from ldm_jax.runtime.processes import is_first
from ldm_jax.training.ema import Constant, Power, check_width, more_averages, post_hoc, unlike

log = logging.getLogger(__name__)
_WIDTH = "sigma_rel_"


def write_snapshot(workdir: Path, step: int, averages: dict[str, Any]) -> None:
    """Writes the power-function averages among `averages`, by name; nothing if there are none.

    Only the first process writes; all of them call it.

    Raises:
      OSError: the file cannot be written.
    """
    powers = {name: tree for name, tree in averages.items() if name.startswith(_WIDTH)}
    flat = flatten_dict(to_host(powers), sep="/")
    if powers and is_first():
        (workdir / "averages").mkdir(exist_ok=True)
        write_safetensors(_path(workdir, step), flat)


def exported(ema: Any, averages: dict[str, Any], settings: Any) -> dict[str, Any]:
    """The averages of constant decay, which are exported as models, by the name of the file.

    `ema` is the first; `averages` are the others, by name; `settings` is the config's `train`.
    """
    constant = [each.name for each in more_averages(settings) if isinstance(each, Constant)]
    return {"model": ema} | {f"model_{name}": averages[name] for name in constant}


def reconstruct(
    workdir: Path, sigma_rel: float, step: int | None = None
) -> tuple[int, dict[str, np.ndarray]]:
    """(step, parameters by path) of an average of width `sigma_rel` after `step` updates.

    `step` is that of a snapshot, None the last one's. Logs how far the weights of past
    parameters are from those of an average that is tracked in training.

    Raises:
      ValueError: a width out of its range, a step without snapshot, or a workdir without any.
    """
    check_width("sigma_rel", sigma_rel)
    files = {int(path.stem): open_state(path) for path in (workdir / "averages").glob("*.safeten*")}
    if not files:
        raise ValueError(
            f"{workdir} has no snapshots of averages: train with "
            '--config.train.ema_sigma_rel="(0.05, 0.1)", which writes one at each checkpoint'
        )
    step = max(files) if step is None else step
    if step not in files:  # between snapshots, the end of the average's weights is not in them
        raise ValueError(
            f"step={step}: {workdir} has no snapshot of this step; the nearest is of step "
            f"{min(files, key=lambda number: abs(number - step))}"
        )
    sources = [
        (float(width), number, tensors)
        for number, tensors in sorted(files.items())
        for width in sorted({re.match(rf"{_WIDTH}([^/]+)/", name)[1] for name in tensors})
    ]
    kinds = [(width, number) for width, number, _ in sources]
    factors = post_hoc(kinds, sigma_rel, step)
    log.info(
        "%d snapshots of %d steps; the weights differ by %.2g of those of a tracked average",
        *(len(sources), len(files), unlike(kinds, factors, sigma_rel, step)),
    )
    paths = [name.partition("/")[2] for name in sources[0][2] if _of(sources[0], name)]
    return step, {path: _sum(path, sources, factors) for path in paths}


def write_average(
    workdir: str | Path, sigma_rel: float, out: str | Path, step: int | None = None
) -> int:
    """Writes the run's model with parameters averaged by width `sigma_rel`; returns the step.

    What does not train, the config, and an autoencoder's `scale_factor` are those of the run's
    `model.safetensors`.

    Raises:
      FileNotFoundError: the run has not exported its model.
      ValueError: see `reconstruct`.
    """
    workdir = Path(workdir).expanduser()
    step, averaged = reconstruct(workdir, sigma_rel, step)
    model = open_any(exported_file(workdir))
    params = flatten_dict(model.params, sep="/", keep_empty_nodes=True) | averaged
    save_model(Path(out).expanduser(), model.config, unflatten_dict(params, sep="/"))
    return step


def _sum(path: str, sources: list[tuple[float, int, Tensors]], factors: np.ndarray) -> np.ndarray:
    """Factors differ in sign and exceed 1, so the sum is of float64."""
    total = 0.0
    for (width, _, tensors), factor in zip(sources, factors, strict=True):
        total = total + factor * np.asarray(tensors[f"{Power(width).name}/{path}"], np.float64)
    return np.float32(total)


def _of(source: tuple[float, int, Tensors], name: str) -> bool:
    return name.startswith(f"{Power(source[0]).name}/")


def _path(workdir: Path, step: int) -> Path:
    return workdir / "averages" / f"{step:07d}.safetensors"
