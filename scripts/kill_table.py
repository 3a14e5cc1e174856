"""Kills small runs of the trainer at random moments, and checks how they end.

    python -m scripts.kill_table [--count=100] [--log=kills.jsonl]

A run is one or two processes on 1 to 8 forced devices. One process gets a SIGKILL: in its start-up,
between its checkpoints, or just after the folder of one appears. The other of two must end by
itself within a minute, or two before they have met. Then the same command, at times for other
devices or processes, must resume at the newest checkpoint that stood under its name, and end with
the model of the run that nothing killed: bit for bit where devices and processes stay the same,
else to 1e-5.

Prints the table of docs/pod.md. Kills in `--log` are not made again.
"""

import argparse
import json
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.training.least_squares import model
from tests.training.members import ended, pair, start

SETTINGS = {"train.steps": 400, "train.checkpoint_every": 20, "train.log_every": 20}
MOMENTS = ("start-up", "training", "saving")
MINUTE = 60.0


class Layout(NamedTuple):
    """Processes, and forced devices of each."""

    processes: int
    devices: int

    def __str__(self) -> str:
        devices = self.processes * self.devices
        several = "es" if self.processes > 1 else "", "s" if devices > 1 else ""
        return f"{self.processes} process{several[0]}, {devices} device{several[1]}"

    def start(self, workdir: Path) -> list[Any]:
        if self.processes == 1:
            return [start(workdir, devices=self.devices, settings=SETTINGS)]
        both = [self.devices] * 2
        return pair(workdir, devices=both, settings=[SETTINGS] * 2)


LAYOUTS = (Layout(1, 1), Layout(1, 2), Layout(1, 8), Layout(2, 1), Layout(2, 4))


def saved(workdir: Path) -> list[int]:
    """The steps of the checkpoints that stand under their names."""
    names = (path.name for path in (workdir / "checkpoints").glob("*"))
    return sorted(int(name) for name in names if name.isdigit())


def entries(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").glob("*")}


def wait_for_moment(moment: str, workdir: Path, chance: random.Random, whole: float) -> None:
    """Waits for a random moment of a run that takes `whole` seconds."""
    if moment == "start-up":
        time.sleep(chance.uniform(0.0, 0.8) * whole)
        return
    deadline, wanted = time.monotonic() + 10 * whole, 20 * chance.randrange(1, 20)
    while time.monotonic() < deadline and not any(step >= wanted for step in saved(workdir)):
        time.sleep(0.002)
    if moment == "training":
        time.sleep(chance.uniform(0.0, 0.1))
        return
    before = entries(workdir)
    while time.monotonic() < deadline and entries(workdir) <= before:
        time.sleep(0.0005)
    time.sleep(chance.uniform(0.0, 0.02))


def kill(seed: int, folder: Path, whole: dict[Layout, tuple[float, dict]]) -> dict[str, Any]:
    """One kill and what came of it."""
    chance = random.Random(seed)
    layout, moment = LAYOUTS[seed % len(LAYOUTS)], MOMENTS[seed // len(LAYOUTS) % len(MOMENTS)]
    after = layout if seed % 4 else LAYOUTS[(seed + 1) % len(LAYOUTS)]
    workdir = folder / str(seed)
    processes = layout.start(workdir)
    wait_for_moment(moment, workdir, chance, whole[layout][0])
    killed = chance.choice(processes)
    killed.kill()
    at = time.monotonic()
    # One that has not met the other yet waits for it a minute (--wait) before it gives up.
    outcomes = ended(*processes, timeout=MINUTE * (2 if moment == "start-up" else 1))
    waited = time.monotonic() - at
    hit = killed.returncode == -9
    newest = max(saved(workdir), default=0)
    for code, output in (results := ended(*after.start(workdir))):
        assert code == 0, (seed, output)
    resumed = re.search(r"Resuming .* at step (\d+)", results[0][1])
    from_step = int(resumed[1]) if resumed else 0
    assert not hit or from_step == newest, (seed, from_step, newest, outcomes)
    found, wanted = model(workdir), whole[after][1]
    difference = max(
        float(np.max(np.abs(np.subtract(found[name], wanted[name])) / np.abs(wanted[name])))
        for name in wanted
    )
    same = after == layout
    assert difference == 0.0 if same else difference <= 1e-5, (seed, difference)
    return {
        "seed": seed, "layout": str(layout), "after": str(after), "moment": moment, "hit": hit,
        "resumed": from_step, "difference": difference, "waited": waited,
    }  # fmt: skip


def table(kills: list[dict[str, Any]]) -> str:
    lines = [f"| | {' | '.join(MOMENTS)} | resumed elsewhere | largest difference |"]
    lines.append("|---" * (len(MOMENTS) + 3) + "|")
    for layout in map(str, LAYOUTS):
        of = [each for each in kills if each["layout"] == layout and each["hit"]]
        counts = (str(sum(each["moment"] == moment for each in of)) for moment in MOMENTS)
        elsewhere = [each["difference"] for each in of if each["after"] != layout]
        largest = f"{max(elsewhere):.1e}" if elsewhere else "–"
        lines.append(f"| {layout} | {' | '.join(counts)} | {len(elsewhere)} | {largest} |")
    return "\n".join(lines)


def make_kills(seeds: range, log: Path) -> list[dict[str, Any]]:
    """The kills of these seeds; those in `log` already are read from it."""
    kills = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {each["seed"] for each in kills}
    with tempfile.TemporaryDirectory() as folder:
        whole = {}
        for seed in (seed for seed in seeds if seed not in done):
            for layout in set(LAYOUTS) - whole.keys():
                at, workdir = time.monotonic(), Path(folder) / str(layout)
                for code, output in ended(*layout.start(workdir)):
                    assert code == 0, output
                whole[layout] = time.monotonic() - at, model(workdir)
            kills.append(kill(seed, Path(folder), whole))
            with log.open("a") as file:
                print(json.dumps(kills[-1]), file=file)
    return kills


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--log", type=Path, default=Path("kills.jsonl"))
    given = parser.parse_args()
    print(table(make_kills(range(given.count), given.log)))
