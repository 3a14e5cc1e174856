"""Compiles the training steps of published models for slices of TPUs, from 4 to 256 chips.

    python -m scripts.plan_table [--log=plan.jsonl] [--rows=REGEX]

Needs libtpu: see docs/tpu-plan.md. A row takes minutes to an hour; rows in `--log` are not compiled
again, and `--rows` chooses by their names, as in --rows='sd1 v5e'. Prints a table of them all.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from configs.published import get_config
from ldm_jax.runtime.mesh import make_mesh
from ldm_jax.runtime.meters import TERA, chip_of
from ldm_jax.runtime.plan import compile_usage, roofline, size
from ldm_jax.runtime.topologies import topology_devices
from ldm_jax.training.program import lower_step
from ldm_jax.training.tasks import make_task

A_CHIP = {  # pictures
    "cin256-v2": 16,
    "txt2img-1p4B": 8,
    "sd1": 8,
    "sd2-v": 4,
    "sdxl-base": 1,
    "kl-f8": 4,
}
SLICES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v5e:16x16", "v5p:4x8x8", "v6e:16x16")
TITLES = ("model", "slice, pictures a chip", "memory of a chip", "TFLOP", "accessed", "sent")
TITLES += ("least time, bound by", "images/s a chip, MFU")


def settings(name: str, chips: int) -> Any:
    """bfloat16, the state over four chips, latents and frozen text states in memory."""
    config = get_config(name)
    config.precision, config.mesh.fsdp = "bfloat16", 4
    config.train.batch_size = A_CHIP[name] * chips
    if config.task == "diffusion":
        config.latents = "memory"
        frozen = name.startswith("sd")  # LDM's text transformer trains
        config.text_states = "memory" if frozen else "step"
    return config


def compiled(name: str, topology: str) -> dict[str, Any]:
    """What `ldm_jax.plan` says of a row, of a chip."""
    devices = topology_devices(topology)
    config, chip = settings(name, len(devices)), chip_of(devices[0])
    lowered = lower_step(make_task(config, abstract=True), config, make_mesh(config.mesh, devices))
    usage, flops = compile_usage(lowered.lowered, chip.memory), lowered.flops / len(devices)
    row = dict(needed=usage.needed, capacity=chip.memory, fits=usage.fits, seconds=usage.seconds)
    if not usage.fits:
        return row
    bound = roofline(usage, flops, chip)
    row |= dict(flops=flops, accessed=usage.accessed, sent=sum(usage.sent.values()))
    return row | dict(time=bound.seconds, by=bound.by, mfu=bound.mfu)


def line(name: str, topology: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    memory = f"{size(row['needed'])} of {size(row['capacity'])}"
    values = [name, f"{topology}, {A_CHIP[name]}", memory]
    if not row["fits"]:
        return f"| {' | '.join([*values[:2], memory + ': does not fit', *[''] * 5])} |"
    values += [f"{row['flops'] / TERA:.3g}", size(row["accessed"]), size(row["sent"])]
    values += [f"{1e3 * row['time']:.3g} ms, {row['by']}"]
    values += [f"{A_CHIP[name] / row['time']:.3g}, {row['mfu']:.0%}"]
    return f"| {' | '.join(values)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=Path, default=Path("plan.jsonl"))
    parser.add_argument("--rows", default="", help="a regular expression on 'model slice'")
    asked = parser.parse_args()
    lines = asked.log.read_text().splitlines() if asked.log.exists() else []
    known = {each["row"]: each for each in map(json.loads, lines)}
    rows = [(f"{name} {at}", name, at) for at in SLICES for name in A_CHIP]
    for key, name, topology in rows:
        if key not in known and re.search(asked.rows, key):
            known[key] = {"row": key} | compiled(name, topology)
            with asked.log.open("a") as log:
                log.write(json.dumps(known[key]) + "\n")
            print(line(name, topology, known[key]), flush=True)
    print("\n| " + " | ".join(TITLES) + " |\n" + "|---" * len(TITLES) + "|")
    for key, name, topology in rows:
        if key in known:
            print(line(name, topology, known[key]))


if __name__ == "__main__":
    main()
