"""Damages 200 checkpoints, each in another way, and reads them.

    python -m scripts.damage_table [--count=200]

Every fourth time both checkpoints of a run are damaged, else the newest. What is read must be bit
for bit what was saved in that step, or the message must name what is damaged; anything else ends
the script with an error. Prints the table of docs/pod.md.
"""

import argparse
import logging
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import jax
import numpy as np

from ldm_jax.runtime.checkpoints import Checkpoints, abstract_like
from ldm_jax.runtime.mesh import make_mesh, replicated

SAVED = (100, 200)
OUTCOMES = ("read whole", "fell back, with a warning", "refused, naming both")


def harm(path: Path, how: str, chance: random.Random) -> None:
    """Damages a file in one of the ways that disks and people do."""
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(content[: chance.randrange(len(content))])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "append":
        path.write_bytes(content + b"\0")
    elif how == "zeros":
        path.write_bytes(bytes(len(content)))
    elif how == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    elif how == "rename":
        path.rename(path.with_name(path.name + ".partial"))


HARMS = ("delete", "truncate", "empty", "append", "zeros", "flip", "rename")


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def state_of(step: int) -> dict:
    """Parameters, average and moments of a small network, other ones in each step."""
    rng = np.random.default_rng(step)
    layers = {f"layer_{i}": rng.standard_normal((8, 8), np.float32) for i in range(6)}
    return {"step": np.int32(step), "params": layers, "ema": layers, "moments": (layers, layers)}


def outcome(directory: Path, states: dict[int, dict]) -> str:
    """What reading the run's checkpoints gives; raises AssertionError for garbage."""
    shardings = jax.tree.map(lambda _: replicated(make_mesh({})), states[SAVED[0]])
    abstract = abstract_like(jax.eval_shape(lambda: states[SAVED[0]]), shardings)
    checkpoints = Checkpoints(directory)
    try:
        step, state = checkpoints.restore_newest(abstract)
    except ValueError as error:
        assert all(f"step {step}: " in str(error) for step in SAVED), error
        return OUTCOMES[2]
    finally:
        checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, state, states[step])
    return OUTCOMES[SAVED[::-1].index(step)]


def main(count: int) -> None:
    states = {step: state_of(step) for step in SAVED}
    found = {how: Counter() for how in HARMS}
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        checkpoints = Checkpoints(whole)
        for step, state in states.items():
            checkpoints.save(step, state, {"config": {}})
        checkpoints.close()
        for seed in range(count):
            chance, copy = random.Random(seed), Path(folder) / str(seed)
            shutil.copytree(whole, copy)
            how = HARMS[seed % len(HARMS)]
            for step in SAVED if seed % 4 == 3 else SAVED[1:]:
                harm(chance.choice(files_of(copy / str(step))), how, chance)
            found[how][outcome(copy, states)] += 1
            shutil.rmtree(copy)
    print(f"| damage | {' | '.join(OUTCOMES)} |\n|---|---|---|---|")
    for how, counts in found.items():
        print(f"| {how} | {' | '.join(str(counts[outcome]) for outcome in OUTCOMES)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=200)
    logging.disable(logging.ERROR)  # about each damage
    main(parser.parse_args().count)
