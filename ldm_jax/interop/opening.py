"""Any model, whoever wrote it: `open_any` finds out what a path holds, `export` writes one."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from ldm_jax.interop import compvis, diffusers, native
from ldm_jax.interop.files import open_state
from ldm_jax.interop.layout import Imported

log = logging.getLogger(__name__)
LAYOUTS = {
    "single_file": native.save_model,
    "compvis": compvis.write,
    "diffusers": diffusers.write,
}


def _file(path: Path, dtype: Any, ema: bool | str) -> Imported:
    state = open_state(path)
    if native.is_ours(state):
        config, params = native.read_model(state, dtype)
        version = state.metadata.get("version", "an unknown version")
        return Imported(config, params, f"{config['task']} model of ldm_jax {version}", {})
    return compvis.read_state(path, state, ema, dtype)


def _folder(path: Path, dtype: Any) -> Imported:
    if (path / "model_index.json").is_file():
        return diffusers.read(path, dtype)
    about = path / "config.json"
    try:
        described = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{about} is no JSON: {error}") from error
    if "_class_name" in described:
        return diffusers.read_component(path, dtype)
    if "architectures" in described or "model_type" in described:
        what = described.get("architectures") or described.get("model_type")
        raise ValueError(
            f"{path} holds {what} of transformers alone, from which no picture comes: open the "
            "folder of the whole model, with model_index.json"
        )
    return _file(native.exported_file(path), dtype, "auto")


def read_any(
    path: str | os.PathLike = "", dtype: Any = "float32", ema: bool | str = "auto"
) -> Imported:
    """What a file or folder holds: a model, an autoencoder, or (task "unet") a UNet alone.

    A workdir of ours or what it exported; a pipeline, an autoencoder or a UNet of diffusers; one
    file in CompVis' or SGM's layout; "" is what ships. `reports` says what is missing, misshapen or
    unused.

    Args:
      dtype: of the parameters.
      ema: see `compvis.read`.

    Raises:
      FileNotFoundError: there is nothing, or a part is missing.
      ValueError: what is there is damaged, or no model of a kind that we know.
    """
    path = Path(path).expanduser() if str(path) else native.SHIPPED
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}: there is no such file or folder")
    return _folder(path, dtype) if path.is_dir() else _file(path, dtype, ema)


def open_any(
    path: str | os.PathLike = "", dtype: Any = "float32", ema: bool | str = "auto"
) -> Imported:
    """As `read_any`, for use: tensors that nothing uses are logged.

    Raises ValueError, too, for keys that are missing or misshapen, and for a UNet alone.
    """
    found = read_any(path, dtype, ema)
    if found.config["task"] == "unet":
        raise ValueError(
            f"{path} holds a UNet alone ({found.about}): open the whole model, whose autoencoder "
            "and conditioners it needs"
        )
    for network, report in found.reports.items():
        lacking = [f"{key} is missing" for key in report.missing] + list(report.misshapen)
        if lacking:
            more = f", and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            raise ValueError(f"{path}: {network} is not whole: {'; '.join(lacking[:3])}{more}")
        if report.extra:
            some = ", ".join(report.extra[:3])
            log.warning("%s: %d tensors are not used, such as %s", path, len(report.extra), some)
    return found


def export(
    path: str | os.PathLike,
    config: dict[str, Any],
    params: dict[str, Any],
    dtype: str = "float32",
    layout: str = "single_file",
) -> None:
    """Writes a model, whole or not at all; folders above `path` are made.

    `layout` is "single_file" (ours, which says all of it), "compvis" or "diffusers" (a folder).

    Raises ValueError for no such layout, or one that cannot say this model.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: choose one of {', '.join(LAYOUTS)}")
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    LAYOUTS[layout](path, config, params, dtype)
