"""Networks that follow a hint, ControlNets and T2I-Adapters: which of them a file holds."""

import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.interop import control, t2i
from ldm_jax.interop.files import open_state
from ldm_jax.interop.native import is_ours


class Kind(NamedTuple):
    """A kind of network.

    Attributes:
      title: for messages.
      file: its name in a workdir.
      read: (path, config of the model, dtype) → its section, and parameters.
      write: (path, section, parameters, layout) → None.
    """

    title: str
    file: str
    read: Callable
    write: Callable


# By the kind of the section in a model's `conditioning`, which is the task of a file of ours.
KINDS = {
    control.TASK: Kind("ControlNet", control.FILE, control.read_control, control.write_control),
    t2i.TASK: Kind("T2I-Adapter", t2i.FILE, t2i.read_t2i, t2i.write_t2i),
}


def kind_of(path: str | os.PathLike) -> str:
    """The key of `KINDS` of what a path holds; that of ControlNets, if it is neither.

    Raises ValueError for networks that were published beside T2I-Adapters, and as `open_state`.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        about = path / "config.json"
        adapter = about.is_file() and t2i.CLASS in about.read_text(encoding="utf-8")
        return t2i.TASK if adapter or (path / t2i.FILE).is_file() else control.TASK
    if not path.exists():
        return control.TASK
    state = open_state(path)
    if is_ours(state):
        return t2i.TASK if t2i.TASK in json.loads(state.metadata["config"]) else control.TASK
    for pattern, what in t2i.RELATIVES.items():
        if name := next((name for name in state if re.match(pattern, name)), None):
            raise ValueError(f"{path} is {what}, which is not supported (it has {name})")
    return t2i.TASK if t2i.layout_of(state) else control.TASK


def read_hinted(
    path: str | os.PathLike, config: dict[str, Any], dtype: Any = "float32"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(section of `conditioning`, parameters) of a ControlNet or a T2I-Adapter for the model of
    `config`. Raises as `read_control` and `read_t2i`."""
    kind = kind_of(path)
    network, params = KINDS[kind].read(path, config, dtype)
    return dict(kind=kind, dropout=0.0, network=network), params


def scaled(kind: str, params: dict[str, Any], scale: float) -> dict[str, Any]:
    """Parameters of `scale` times the effect: a ControlNet's last layers are linear, so theirs are
    multiplied; a T2I-Adapter gets the number, see `AdapterEmbedder`."""
    if kind == t2i.TASK:
        return params | {"scale": np.asarray(scale, jax.tree.leaves(params)[0].dtype)}
    last = ("zero_convs", "middle_block_out")
    return {
        layer: jax.tree.map(lambda leaf: leaf * leaf.dtype.type(scale), leaves)
        if layer.startswith(last)
        else leaves
        for layer, leaves in params.items()
    }


def add_control(
    path: str | os.PathLike,
    config: dict[str, Any],
    params: dict[str, Any],
    scale: float = 1.0,
    name: str = "",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, parameters) of a model with the ControlNet or T2I-Adapter of a file; see
    `read_hinted`.

    Args:
      scale: of its effect: see `scaled`.
      name: of its condition; default: "control", then "control_2", and so on.

    Raises ValueError as `read_hinted`, for a name that is taken, and for no finite scale.
    """
    if not np.isfinite(scale):
        raise ValueError(f"scale={scale}: choose a finite number")
    sections = config["conditioning"]
    if not name:
        names = ("control" if i == 1 else f"control_{i}" for i in itertools.count(1))
        name = next(name for name in names if name not in sections)
    if name in sections or name in params:
        raise ValueError(f"{path}: the model already has a condition {name!r}; choose another name")
    dtype = jax.tree.leaves(params["unet"])[0].dtype
    section, own = read_hinted(path, config, dtype)
    own = scaled(section["kind"], own, scale)
    return config | {"conditioning": sections | {name: section}}, params | {name: own}
