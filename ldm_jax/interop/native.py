"""Our own file: one `.safetensors` that says what it holds.

Tensors are named by their path ("unet/conv_in/kernel"); the header carries the configuration that
builds the networks, so a file needs nothing beside it.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ldm_jax.version import __version__

FORMAT = "ldm_jax"
SHIPPED = Path(__file__).parents[1] / "weights" / "emoji.safetensors"


def save_model(
    path: str | os.PathLike, config: dict[str, Any], params: dict[str, Any], dtype: str = "float32"
) -> None:
    """Writes `params` (nested, networks at the top) as `dtype` and `config` (JSON-able).

    The file appears whole or not at all.
    """
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    flat = flatten_dict(jax.device_get(params), sep="/")
    tensors = {name: np.ascontiguousarray(value.astype(kind)) for name, value in flat.items()}
    metadata = {"format": FORMAT, "version": __version__, "config": json.dumps(config)}
    path = Path(path)
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata=metadata)
    part.chmod(0o644)  # safetensors makes files that only their owner can read
    os.replace(part, path)


def load_model(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, params as nested numpy float32 arrays) of a file that `save_model` wrote.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no safetensors, or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no model file at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k).astype(np.float32) for k in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not one that ldm_jax exported")
    return json.loads(metadata["config"]), unflatten_dict(tensors, sep="/")


def open_model(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, params) of a model file, of a finished run's workdir, or, for "", of what ships.

    Raises:
      FileNotFoundError, ValueError: there is no model there; says what was looked for.
    """
    path = Path(path) if str(path) else SHIPPED
    if path.is_dir():
        exported = path / "model.safetensors"
        if not exported.exists():
            unfinished = (path / "config.json").exists()
            reason = (
                "this run has not exported its model yet: it does when it ends, or when Ctrl-C or "
                "SIGTERM stops it"
                if unfinished
                else "the directory is neither a run's workdir nor holds a model.safetensors"
            )
            raise FileNotFoundError(f"no model in {path}: {reason}")
        path = exported
    return load_model(path)
