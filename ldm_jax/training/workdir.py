"""A run's directory: made, recognised, and refused where it belongs to another run."""

import json
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

# What may differ when a run goes on: how long and how often, and on which devices.
HARMLESS = ("train.steps", "train.log_every", "train.checkpoint_every", "train.preview_every")
HARMLESS += ("train.keep", "mesh.data", "mesh.fsdp")


def config_dict(config: Any) -> dict[str, Any]:
    """A ConfigDict as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json())


def open_workdir(config: Any, workdir: str | Path) -> Path:
    """Makes `workdir` with `config.json` in it, or checks that the one there agrees.

    Raises:
      ValueError: the directory holds a run of another config; shows the difference.
      OSError: it cannot be made or written.
    """
    workdir, wanted = Path(workdir), config_dict(config)
    path = workdir / "config.json"
    if path.exists():
        there = json.loads(path.read_text())
        different = config_difference(there, wanted)
        if different:
            lines = "\n".join(f"  {key}: {a} there, {b} now" for key, (a, b) in different.items())
            raise ValueError(
                f"{workdir} holds a run of another config:\n{lines}\n"
                "Choose another --workdir, or give the same settings to resume this one."
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(wanted, indent=2) + "\n")
    except OSError as error:
        raise OSError(f"cannot write to the workdir {workdir}: {error}") from error
    return workdir


def config_difference(there: dict, now: dict) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (value there, value now)} for settings that would change the run."""
    a, b = flatten_dict(there, sep="."), flatten_dict(now, sep=".")
    absent = "(absent)"
    pairs = {key: (a.get(key, absent), b.get(key, absent)) for key in sorted(a.keys() | b.keys())}
    return {key: (x, y) for key, (x, y) in pairs.items() if x != y and key not in HARMLESS}
