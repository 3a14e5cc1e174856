"""Sweeps: the settings of a config's `sweep()`, their runs, and the comparison of the results."""

import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import json
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from ldm_jax.runtime.logging import read_metrics
from ldm_jax.training.report import is_detail, read_series, write_comparison

Setting = dict[str, Any]
LONGEST_NAME = 120  # many file systems allow 255 bytes
VARIANT = "variant"  # the key of a setting that names a variant of the config, and no field


@dataclasses.dataclass(frozen=True)
class Earlier:
    """The value of a field that is the workdir of an earlier setting, here by its name."""

    name: str

    def __str__(self) -> str:
        return self.name


def settings_of(path: str, variant: str = "") -> list[Setting]:
    """What `sweep()` of a config file returns; one with a parameter gets the variant of --config.

    Raises:
      ValueError: it is not a list of dicts of different names, or an `Earlier` is not earlier.
    """
    sweep = runpy.run_path(path).get("sweep")
    if sweep is None:
        raise ValueError(f"{path} defines no sweep(): see the docstring of ldm_jax/sweep.py")
    settings = list(sweep(variant) if inspect.signature(sweep).parameters else sweep())
    if not settings or not all(isinstance(setting, dict) and setting for setting in settings):
        raise ValueError(f"sweep() of {path} must return a list of dicts {{field: value}}")
    names = [name_of(setting) for setting in settings]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"sweep() of {path} returns twice: {', '.join(sorted(twice))}")
    for i, setting in enumerate(settings):
        for needed in needs(setting):
            if needed not in names[:i]:
                raise ValueError(f"sweep() of {path}: no setting {needed} before {names[i]}")
    return settings


def needs(setting: Setting) -> list[str]:
    """The names of the settings whose workdirs a setting starts from."""
    return [value.name for value in setting.values() if isinstance(value, Earlier)]


def config_of(path: str, setting: Setting, default: Any) -> Any:
    """The config of the variant that a setting names; `default` if it names none.

    Raises:
      ValueError: there is no such variant.
    """
    if VARIANT not in setting:
        return default
    return runpy.run_path(path)["get_config"](setting[VARIANT])


def check(config: Any, setting: Setting, path: str) -> None:
    """Raises ValueError for a field that the config does not have, or a value of another type."""
    fields = list(flags_of(config.to_dict()))
    for field, value in setting.items():
        if field == VARIANT:
            continue
        if field not in fields:
            near = difflib.get_close_matches(field, fields, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"sweep() of {path}: the config has no {field}{hint}")
        try:
            plain = str(value) if isinstance(value, Earlier) else value
            config.copy_and_resolve_references().update_from_flattened_dict({field: plain})
        except (TypeError, ValueError) as error:
            raise ValueError(f"sweep() of {path}: {field}={value!r}: {error}") from error


def flags_of(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as {"a.b": value}."""
    flat = {}
    for key, value in values.items():
        deeper = isinstance(value, dict) and value
        flat |= flags_of(value, f"{prefix}{key}.") if deeper else {prefix + key: value}
    return flat


def name_of(setting: Setting) -> str:
    """The directory of a setting: "optimizer.lr=0.001,seed=2". Of a variant its name stands alone,
    and the workdir that it starts from is left out."""
    parts = {field: value for field, value in setting.items() if not isinstance(value, Earlier)}
    parts = [value if field == VARIANT else f"{field}={value}" for field, value in parts.items()]
    name = ",".join(parts)
    name = re.sub(r"[^\w.=,+-]+", "_", name)
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def command(config: str, overrides: Setting, setting: Setting, root: Path) -> list[str]:
    """The training of one setting in its directory in `root`, from the directory of train.py."""
    if VARIANT in setting:
        config = f"{config.partition(':')[0]}:{setting[VARIANT]}"
    values = overrides | {field: value for field, value in setting.items() if field != VARIANT}
    more = [
        f"--config.{field}={root / value.name if isinstance(value, Earlier) else value}"
        for field, value in values.items()
    ]
    workdir = root / name_of(setting)
    return ["python", "train.py", f"--config={config}", f"--workdir={workdir}", *more]


def finished(workdir: Path) -> bool:
    """Whether the run there has done its last step and exported the model."""
    try:
        steps = json.loads((workdir / "config.json").read_text())["train"]["steps"]
    except (OSError, ValueError, KeyError):
        return False
    last = max((line["step"] for line in read_metrics(workdir)), default=-1)
    return last >= steps and (workdir / "model.safetensors").exists()


def train(arguments: list[str], log: Path) -> int:
    """Runs a command of `command`; its output goes to `log`. SIGTERM is passed on."""
    with (
        log.open("ab") as output,
        subprocess.Popen(
            [sys.executable, *arguments[1:]], stdout=output, stderr=subprocess.STDOUT
        ) as child,
    ):
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            while True:
                with contextlib.suppress(KeyboardInterrupt):  # the child gets Ctrl-C itself
                    return child.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def write_results(root: Path, settings: list[Setting], failed: dict[str, int]) -> None:
    """`results.md` and `results.html` of the runs so far."""
    fields = list(dict.fromkeys(field for setting in settings for field in setting))
    series = {name_of(setting): read_series(root / name_of(setting)) for setting in settings}
    reported = dict.fromkeys(metric for found in series.values() for metric in found)
    metrics = [m for m in reported if m.startswith("held_out/") and not is_detail(m)]
    metrics.insert(0, "train/loss")
    lines = ["| " + " | ".join([*fields, "state", *metrics]) + " |"]
    lines.append("|" + "---|" * (len(fields) + 1 + len(metrics)))
    for setting in settings:
        name = name_of(setting)
        found = series[name]
        step = max((points[-1][0] for points in found.values()), default=0)
        state = "finished" if finished(root / name) else f"step {step}" if step else "not begun"
        state = f"failed at step {step}" if name in failed else state
        values = [f"{found[m][-1][1]:.5g}" if m in found else "" for m in metrics]
        row = [str(setting.get(field, "")) for field in fields]
        lines.append("| " + " | ".join([*row, state, *values]) + " |")
    (root / "results.md").write_text("\n".join(lines) + "\n")
    begun = {name: root / name for name, found in series.items() if found}
    if begun:
        write_comparison(begun, root / "results.html")


def as_slurm(commands: list[list[str]]) -> str:
    """A job array; a job that is preempted is put back into the queue and resumes."""
    lines = "\n".join(f"  {shlex.quote(shlex.join(each))}" for each in commands)
    return f"""#!/bin/bash
#SBATCH --job-name=sweep
#SBATCH --array=0-{len(commands) - 1}
#SBATCH --requeue
#SBATCH --signal=TERM@120
RUNS=(
{lines}
)
exec srun bash -c "${{RUNS[$SLURM_ARRAY_TASK_ID]}}\""""


def as_gke(commands: list[list[str]]) -> str:
    """An indexed Job of Kubernetes."""
    cases = "\n".join(f"{i}) exec {shlex.join(each)} ;;" for i, each in enumerate(commands))
    script = f"case $JOB_COMPLETION_INDEX in\n{cases}\nesac\n"
    container = {"name": "train", "image": "YOUR_IMAGE", "command": ["bash", "-c", script]}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "sweep"},
        "spec": {
            "completionMode": "Indexed",
            "completions": len(commands),
            "parallelism": len(commands),
            "backoffLimitPerIndex": 3,
            "template": {"spec": {"restartPolicy": "Never", "containers": [container]}},
        },
    }
    return yaml.safe_dump(job, sort_keys=False)
