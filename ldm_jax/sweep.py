"""Trains a config once for each setting of its `sweep()`, and compares the runs.

    python -m ldm_jax.sweep --config=configs/txt2img.py:demo --workdir=runs/sweep
    python -m ldm_jax.sweep --config=configs/txt2img.py:demo --workdir=runs/sweep --print=slurm

`sweep()` of a config file returns a list of settings, dicts from fields to values:

    def sweep():
        return [{"optimizer.lr": lr, "seed": seed} for lr in (1e-3, 3e-3) for seed in range(3)]

A setting may name a variant of the config file, and start from the workdir of an earlier one. It is
then called after the variant, and `sweep(variant)` gets that of --config:

    from ldm_jax.training.sweeps import Earlier

    def sweep(variant):
        first = {"variant": "autoencoder"}
        return [first, {"variant": "diffusion", "first_stage": Earlier("autoencoder")}]

If the file has a function `after(root, variant)`, it is called when all runs are finished.

Each setting trains in a process and a directory of its own, named after the setting. The same
command goes on where a sweep was stopped; runs that are finished are not run again. After each run
`results.md`, a table, and `results.html`, the curves, are written. A run that fails leaves its
output in SETTING.log, and the sweep goes on.

With --print the commands are printed instead: "commands", or a job array for "slurm" or "gke"
(Kubernetes; put the name of your image in it).
"""

import os
import runpy
import shlex
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from ldm_jax.runtime.console import run
from ldm_jax.training.sweeps import (
    as_gke,
    as_slurm,
    check,
    command,
    config_of,
    finished,
    name_of,
    needs,
    settings_of,
    train,
    write_results,
)

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/TASK.py[:variant].")
WORKDIR = flags.DEFINE_string("workdir", None, "The directory of the runs.", required=True)
PRINT = flags.DEFINE_enum(
    "print", None, ["commands", "slurm", "gke"], "Print the commands, and run nothing."
)
flags.mark_flags_as_required(["config"])


def main() -> None:
    config = config_flags.get_config_filename(flags.FLAGS["config"])
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    path, _, variant = config.partition(":")
    root = Path(WORKDIR.value).expanduser()
    settings = settings_of(path, variant)
    for setting in settings:
        check(config_of(path, setting, CONFIG.value), setting, path)
    commands = [command(config, overrides, s, root) for s in settings]
    if PRINT.value:
        if PRINT.value != "commands" and any(map(needs, settings)):
            raise ValueError(
                f"--print={PRINT.value}: settings that start from others' workdirs have an order, "
                "and the jobs of an array have none; use --print=commands"
            )
        shown = {"slurm": as_slurm, "gke": as_gke}.get(
            PRINT.value, lambda all: "\n".join(map(shlex.join, all))
        )
        print(shown(commands))
        return
    if not os.path.isfile("train.py"):
        raise ValueError("there is no train.py here: start the sweep in its directory")
    root.mkdir(parents=True, exist_ok=True)
    failed: dict[str, int] = {}
    left_out: list[str] = []
    for i, (setting, arguments) in enumerate(zip(settings, commands, strict=True)):
        name = name_of(setting)
        if finished(root / name):
            print(f"{i + 1}/{len(settings)} {name}: finished before", flush=True)
            continue
        if without := [other for other in needs(setting) if other in (*failed, *left_out)]:
            left_out.append(name)
            print(
                f"{i + 1}/{len(settings)} {name}: left out, for it needs {without[0]}", flush=True
            )
            continue
        print(f"{i + 1}/{len(settings)} {name}: trains, output in {root / name}.log", flush=True)
        code = train(arguments, root / f"{name}.log")
        if code:
            failed[name] = code
            print(f"  it failed with exit code {code}", flush=True)
        write_results(root, settings, failed)
        if not code and not finished(root / name):
            print("Stopped. The same command resumes.", flush=True)
            return
    write_results(root, settings, failed)
    print((root / "results.md").read_text() + f"Curves: {root / 'results.html'}")
    if failed:
        rest = f"; left out: {', '.join(left_out)}" if left_out else ""
        raise ValueError(f"failed: {', '.join(failed)}; see their .log files in {root}{rest}")
    if after := runpy.run_path(path).get("after"):
        after(root, variant)


if __name__ == "__main__":
    run(main)
