"""The side of a peer: makes the work ready, then does it as often as it is told.

It must import in any peer's environment, so it needs NumPy alone.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

# What a side measures: from a folder with a pipeline in diffusers' layout and `inputs.npz`, a
# function that does the work once, waits for it, and returns the result.
Work = Callable[[], np.ndarray]
Prepare = Callable[[Path, dict[str, np.ndarray]], Work]


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_gigabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1e6


def serve(
    versions: str, works: dict[str, Prepare], accelerator: Callable[[], float] | None = None
) -> None:
    """Prints a line of JSON when the work is ready, and one for each line that it reads: a number,
    of how often to do the work. `accelerator`: the most bytes of its memory until now."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("work", choices=list(works))
    parser.add_argument("--result", type=Path)
    asked = parser.parse_args()
    inputs = dict(np.load(asked.folder / "inputs.npz"))
    began = time.perf_counter()
    work = works[asked.work](asked.folder, inputs)
    result = work()  # compiles and warms up
    np.save(asked.result, np.float32(result))
    ready = time.perf_counter() - began
    print(json.dumps(dict(versions=versions, ready=ready)), flush=True)
    for line in sys.stdin:
        work()  # the caches and the memory were the other side's
        _reset_peak()
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        peak = accelerator() / 1e9 if accelerator else _peak_gigabytes()
        print(json.dumps(dict(seconds=seconds, peak=peak)), flush=True)
