"""Models in any supported layout: `open_any` recognises and reads a path, `export` writes one."""

import json
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.interop import compvis, diffusers, ip_adapter, native
from ldm_jax.interop.adapted import with_base
from ldm_jax.interop.files import Tensors, open_shards, open_state
from ldm_jax.interop.hints import KINDS
from ldm_jax.interop.layout import Imported
from ldm_jax.interop.networks import texts
from ldm_jax.interop.reports import check_report
from ldm_jax.interop.yaml_config import read_original
from ldm_jax.models.build import make_autoencoder

LAYOUTS = {
    "single_file": native.save_model,
    "compvis": compvis.write,
    "diffusers": diffusers.write,
}
DTYPES = ("float32", "float16", "bfloat16")
# The parts that are not a model alone, by task.
ALONE = {
    "unet": "a UNet alone: add autoencoder=PATH and, if it takes a context, text=PATH",
    "text": "a text encoder alone: it can be the text=PATH of a model",
} | {
    task: f"a {kind.title}: it is drawn with beside a model, --control=PATH:HINT"
    for task, kind in KINDS.items()
}


def _file(path: Path, state: Tensors, dtype: Any, options: dict[str, Any]) -> Imported:
    if not native.is_ours(state):
        return compvis.read(path, dtype=dtype, state=state, **options)
    _refuse(path, options)
    config, params = native.read_model(state, dtype)
    if "base" in config:
        return with_base(path, *native.read_model(state), dtype, open_any)
    version = state.metadata.get("version", "an unknown version")
    return Imported(config, params, f"{config['task']} model of ldm_jax {version}", {})


def _refuse(path: Path, options: dict[str, Any]) -> None:
    names = dict(original="config", new_attention_order="new_attention_order", ema="ema")
    for name, option in names.items():
        if options.get(name) not in (None, "", False, "auto"):
            raise ValueError(f"{path} contains its config: {option} is for files of CompVis' code")


def _folder(path: Path, dtype: Any, options: dict[str, Any]) -> Imported:
    _refuse(path, options)
    about = path / "config.json"
    try:
        described = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{about} is not JSON: {error}") from error
    if "_class_name" in described:
        return diffusers.read_component(path, dtype)
    if "architectures" in described or "model_type" in described:
        return _text_encoder(path, described, dtype)
    exported = native.exported_file(path)
    return _file(exported, open_state(exported), dtype, options)


def _text_encoder(path: Path, described: dict[str, Any], dtype: Any) -> Imported:
    """A folder of transformers with a CLIP text encoder; its JSON has what no shape determines."""
    what = described.get("architectures") or described.get("model_type")
    if "CLIPText" not in str(what) and "clip_text_model" not in str(what):
        raise ValueError(f"{path} holds {what} of transformers, where CLIP's text encoder is known")
    found = compvis.read(path, dtype=dtype, state=open_shards(path, "model"))
    network = found.config["conditioning"]["text"]["network"]
    network["activation"] = described.get("hidden_act", "quick_gelu")
    network["heads"] = described.get("num_attention_heads", network["heads"])
    return found


def read_any(
    path: str | os.PathLike = "",
    dtype: Any = "float32",
    ema: bool | str = "auto",
    *,
    config: str | os.PathLike = "",
    new_attention_order: bool = False,
    autoencoder: str | os.PathLike = "",
    text: str | os.PathLike = "",
) -> Imported:
    """Reads a file or folder: a model, or (task "autoencoder", "unet" or "text") a part alone.

    It may be a workdir or our single file; a pipeline, an autoencoder or a UNet of diffusers; a
    text encoder of transformers; one file in CompVis' or SGM's layout; "" is the bundled model.
    `reports` lists missing, misshapen and unused keys.

    Args:
      dtype: of the parameters.
      ema: see `compvis.read`.
      config: the training YAML of a file of CompVis' or SGM's code. For an unpublished model it
        gives what no tensor determines: heads, noise, scale. It is not searched for beside the
        file.
      new_attention_order: see `compvis.read`; a YAML contains it as well.
      autoencoder, text: files or folders whose autoencoder or text encoders replace the model's
        own, which may be missing. The scale of the latents stays the model's.

    Raises:
      FileNotFoundError: there is no such path, or a part is missing.
      ValueError: the content is damaged, or not a supported model; the YAML contradicts the
        tensors; parts that do not fit.
    """
    path = Path(path).expanduser() if str(path) else native.BUNDLED
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}: there is no such file or folder")
    others = {}
    for name, source in (("autoencoder", autoencoder), ("text", text)):
        if str(source):
            other = read_any(source, dtype)
            if not (texts(other.config) if name == "text" else other.config.get(name)):
                raise ValueError(f"{name}={source} holds none, but {other.about}")
            others[name] = replace(other, about=f"{source} ({other.about})")
    options: dict[str, Any] = dict(ema=ema, new_attention_order=new_attention_order)
    if str(config):
        original = options["original"] = read_original(config)
        pixels = original.unet and original.autoencoder["kind"] == "identity"
        if pixels and "autoencoder" not in others:
            section = dict(task="autoencoder", autoencoder=original.autoencoder)
            others["autoencoder"] = Imported(section, {"autoencoder": {}}, "pixels", {})
    if (path / "model_index.json").is_file():
        _refuse(path, options)
        return diffusers.read(path, dtype, **others)
    if path.is_dir():
        found = _folder(path, dtype, options)
    else:
        found = _file(path, open_state(path), dtype, options | others)
    if others and found.config["task"] != "diffusion":
        raise ValueError(f"{path} holds no whole model, but {found.about}: it takes no other parts")
    if "autoencoder" in others:
        found = _with_autoencoder(found, others["autoencoder"])
    if "text" in others:
        found = _with_text(found, others["text"])
    return found


def _with_autoencoder(found: Imported, other: Imported) -> Imported:
    """The model with the autoencoder of `other`; the scale of the latents stays."""
    its = other.config["autoencoder"]
    here, there = found.config["unet"].get("out_channels", 4), make_autoencoder(its).embed_dim
    if here != there:
        raise ValueError(
            f"autoencoder={other.about} has latents of {there} channels, the model of {here}"
        )
    scale = found.config["autoencoder"].get("scale_factor")
    if its.get("kind") != "tiny" and scale is not None:
        its = its | {"scale_factor": scale}
    return _with_parts(found, {"autoencoder": its}, other, ["autoencoder"])


def _with_text(found: Imported, other: Imported) -> Imported:
    """The model with the text encoders of `other`, of the same total width."""
    theirs, config = texts(other.config), found.config
    width = sum(section["network"]["width"] for section in theirs.values())
    if width != config["unet"].get("context_dim"):
        raise ValueError(
            f"text={other.about} makes a context {width} wide, and the model's UNet takes one of "
            f"{config['unet'].get('context_dim')}"
        )
    own = texts(config).keys()
    rest = {name: section for name, section in config["conditioning"].items() if name not in own}
    return _with_parts(found, {"conditioning": theirs | rest}, other, theirs, own)


def _with_parts(
    found: Imported,
    config: dict[str, Any],
    other: Imported,
    names: Collection[str],
    without: Collection[str] = (),
) -> Imported:
    """The model with networks of `other`, and their reports."""
    params, reports = (
        {name: kept for name, kept in ours.items() if name not in without}
        | {name: theirs[name] for name in names if name in theirs}
        for ours, theirs in ((found.params, other.params), (found.reports, other.reports))
    )
    return replace(found, config=found.config | config, params=params, reports=reports)


def open_any(path: str | os.PathLike = "", *args: Any, **options: Any) -> Imported:
    """As `read_any`, for use: unused tensors are logged.

    Also raises ValueError for keys that are missing or misshapen, and for a UNet or a text encoder
    alone.
    """
    found = read_any(path, *args, **options)
    if (alone := ALONE.get(found.config["task"])) is not None:
        raise ValueError(f"{path} holds {alone} ({found.about})")
    for network, report in found.reports.items():
        check_report(path, network, report)
    return found


def export(
    path: str | os.PathLike,
    config: dict[str, Any],
    params: dict[str, Any],
    dtype: str = "float32",
    layout: str = "single_file",
) -> None:
    """Writes a model, or a network of `KINDS`, whole or not at all; folders above it are made.

    `dtype` is one of DTYPES; `layout` is "single_file" (ours, with the config), "compvis" or
    "diffusers" (a folder).

    Raises ValueError for an unknown dtype or layout, or a layout that cannot express this model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: choose one of {', '.join(LAYOUTS)}")
    if (task := config["task"]) in KINDS:
        params = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.dtype(dtype)), params[task])
        layout = "native" if layout == "single_file" else layout
        KINDS[task].write(path, config[task], params, layout)
        return
    if config["task"] == "text" and layout != "single_file":
        raise ValueError(f"task='text': layout {layout!r} has no text encoders alone")
    tokens = [name for section in texts(config).values() for name, _ in section.get("tokens") or ()]
    if tokens and layout != "single_file":
        raise ValueError(
            f"layout={layout!r} has no place for the embedding of {tokens[0]!r}: use "
            "'single_file', or write the model without it"
        )
    sections = config.get("conditioning", {}).items()
    titles = {task: kind.title for task, kind in KINDS.items()} | {ip_adapter.TASK: "IP-Adapter"}
    controls = [(titles[s["kind"]], name) for name, s in sections if s["kind"] in titles]
    if controls and layout != "single_file":
        raise ValueError(
            f"layout={layout!r} has no place for the {controls[0][0]} {controls[0][1]!r}: use "
            "'single_file', or write the model without it"
        )
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    LAYOUTS[layout](path, config, params, dtype)
