"""Our own file: one self-describing `.safetensors`.

Tensors are named by their path ("unet/input_blocks_0_0/kernel"); the header contains the
configuration that builds the networks, and vocabularies that are not bundled, so no other file is
needed.
"""

import base64
import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.interop.files import Tensors, write_safetensors
from ldm_jax.version import __version__

FORMAT = "ldm_jax"
BUNDLED = Path(__file__).parents[1] / "weights" / "bundled.safetensors"


def save_model(
    path: str | os.PathLike, config: dict[str, Any], params: dict[str, Any], dtype: str = "float32"
) -> None:
    """Writes `params` (nested, networks at the top) as `dtype` and `config` (JSON-able).

    The file appears whole or not at all.
    """
    flat = flatten_dict(jax.device_get(params), sep="/")
    tensors = {name: np.asarray(value, jnp.dtype(dtype)) for name, value in flat.items()}
    files = {
        section["vocabulary"]: base64.b64encode(_packed(Path(section["vocabulary"]))).decode()
        for section in _vocabularies(config)
        if Path(section["vocabulary"]).is_file() or section.get("tokenizer") == "folder"
    }
    metadata = {"format": FORMAT, "version": __version__, "config": json.dumps(config)}
    write_safetensors(path, tensors, metadata | {"files": json.dumps(files)})


def is_ours(state: Tensors) -> bool:
    """Whether these tensors are a file that `save_model` wrote."""
    return state.metadata.get("format") == FORMAT


def read_model(state: Tensors, dtype: Any = "float32") -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, params as nested arrays of `dtype`) of a file that `save_model` wrote."""
    config = json.loads(state.metadata["config"])
    files = json.loads(state.metadata.get("files", "{}"))
    for section in _vocabularies(config):
        if section["vocabulary"] in files:
            content = base64.b64decode(files[section["vocabulary"]])
            path = _unpacked(Path(section["vocabulary"]).name, content)
            section["vocabulary"] = str(path)
            if section.get("tokenizer") == "folder":
                section["vocabulary"] = str(path.with_name(f"{path.name}.files"))
                with zipfile.ZipFile(path) as file:
                    file.extractall(section["vocabulary"])
    params = {name: np.asarray(state[name], jnp.dtype(dtype)) for name in state}
    # A network without parameters has no tensors: pixels in place of latents.
    return config, {"autoencoder": {}} | unflatten_dict(params, sep="/")


def exported_file(workdir: Path) -> Path:
    """The path of a run's model in its workdir.

    Raises:
      FileNotFoundError: there is none; says what is missing.
    """
    exported = workdir / "model.safetensors"
    if not exported.exists():
        unfinished = (workdir / "config.json").exists()
        reason = (
            "this run has not exported its model yet: it does when it ends, or when Ctrl-C or "
            "SIGTERM stops it"
            if unfinished
            else "the directory is neither a run's workdir nor holds a model.safetensors"
        )
        raise FileNotFoundError(f"no model in {workdir}: {reason}")
    return exported


def _vocabularies(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (s for s in config.get("conditioning", {}).values() if "vocabulary" in s)


def _packed(path: Path) -> bytes:
    """The content of a file, or the files of a folder as a zip."""
    if path.is_file():
        return path.read_bytes()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for part in sorted(p for p in path.rglob("*") if p.is_file()):
            # Without its date, so that the same folder gives the same bytes.
            file.writestr(zipfile.ZipInfo(str(part.relative_to(path))), part.read_bytes())
    return packed.getvalue()


def _unpacked(name: str, content: bytes) -> Path:
    """The path of a temporary file with this content, for tokenizers."""
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"ldm_jax-{os.getuid()}" / digest / name
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{name}.{os.getpid()}.part")
        part.write_bytes(content)
        os.replace(part, path)
    return path
