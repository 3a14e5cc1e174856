"""ControlNets: read for a model, from any layout, and written.

A ControlNet is a trained copy of a UNet's way down (`models.controlnet`), and its tensors have the
UNet's names; names of the others are in `names`. Layouts: "native" is our own file, which describes
itself; "diffusers" a folder, or its weights alone; "compvis" one file of the original code, with
the names `control_model.*`, which may contain the model as well. Only the first two say what no
shape determines; it is then as in the model.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.interop import names
from ldm_jax.interop.diffusers.components import Json, dump, load
from ldm_jax.interop.diffusers.reading import WEIGHTS
from ldm_jax.interop.diffusers.unets import control_from, control_to
from ldm_jax.interop.families import lists
from ldm_jax.interop.fields import Shapes
from ldm_jax.interop.files import Tensors, open_shards, open_state, write_safetensors
from ldm_jax.interop.layout import Slot, read_params, shapes, slots, write_params
from ldm_jax.interop.native import FORMAT, is_ours
from ldm_jax.interop.recognise import OTHERS, UNET
from ldm_jax.interop.reports import check_report
from ldm_jax.models.build import make_autoencoder, tuples
from ldm_jax.models.layers import level_widths
from ldm_jax.models.unet import UNet
from ldm_jax.published import MODELS
from ldm_jax.version import __version__

FILE = "controlnet.safetensors"  # in a workdir
TASK = "control"  # of our file's config, whose section of this name is the network's
# Of the tensors' names, by layout.
PREFIXES = {"native": f"{TASK}/", "diffusers": "", "compvis": "control_model."}
# The tensor by which a file's layout is recognised: of the hint's first convolution.
HINTS = {
    "compvis": "input_hint_block.0.weight",
    "diffusers": "controlnet_cond_embedding.conv_in.weight",
}
GUIDED = "time_cond_proj_dim"  # a field of a UNet that its ControlNet may lack
SIZES = 256  # of the embedding of each of SDXL's numbers
# Networks like a ControlNet, by tensors that only these have.
RELATIVES = {
    r"lora_controlnet": "a Control-LoRA",
    r"lllite_": "a ControlNet-LLLite",
    r".*motion_modules\.": "a SparseCtrl, for videos",
    r"task_embedding|control_add_embedding\.|spatial_ch_projs\.": "a union of ControlNets in one "
    "network",
    r".*(base_to_ctrl|ctrl_to_base|_zero_convs_out)\.": "a ControlNet-XS",
    r"difference$": "a ControlNet that was stored as the difference from its model",
}
# The network's own modules; all others are those of a UNet.
OWN = r"input_hint_block|zero_convs_\d+_0|middle_block_out_0"


class Base(NamedTuple):
    """What a ControlNet and its model must have in common.

    Attributes:
      context: the width of what attention attends to, if any.
      channels: of each skip, from the first.
      places: numbers of the input blocks with attention; None where they may differ.
    """

    context: int | None
    channels: tuple[int, ...]
    places: tuple[int, ...] | None


def _base(fields: dict[str, Any]) -> Base:
    """Of a UNet with these fields."""
    unet = UNet(**tuples(fields))
    channels, places = [], []
    for level, width in enumerate(level_widths(unet.model_channels, unet.channel_mult)):
        channels += [width]  # the first convolution's, or that after downsampling
        if level:
            channels[-1] = channels[-2]
        if 2**level in unet.attention_resolutions:
            places += range(len(channels), len(channels) + unet.num_res_blocks)
        channels += [width] * unet.num_res_blocks
    return Base(unet.context_dim, tuple(channels), tuple(places))


def _such(base: Base) -> str:
    """ ", such as TITLE": a published model that a ControlNet fits."""
    same = (m.title for m in MODELS.values() if _base(m.unet)[:2] == base[:2])
    title = next(same, None)
    return f", such as {title}" if title else ""


def _runs(numbers: tuple[int, ...]) -> str:
    """[64, 64, 128] as "2 × 64, 128"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1][0] += 1
        else:
            found.append([1, number])
    return ", ".join(f"{n} × {number}" if n > 1 else f"{number}" for n, number in found)


def _check_base(
    path: Path, section: dict[str, Any], config: dict[str, Any], found: Base | None = None
) -> None:
    """Raises ValueError for a ControlNet of another model.

    `found` is in the tensors, where nothing else describes the network.
    """
    unet, its = config["unet"], section["unet"]
    here, there = _base(unet), found or _base(its)._replace(places=None)
    if there.context != here.context:
        raise ValueError(
            f"{path} is for a model with context_dim={there.context}{_such(there)}, and this one "
            f"has {here.context}"
        )
    if there.channels != here.channels:
        raise ValueError(
            f"{path} is for a model whose way down has {_runs(there.channels)} channels"
            f"{_such(there)}, and this one's has {_runs(here.channels)}"
        )
    if there.places not in (None, here.places):
        raise ValueError(
            f"{path} is for a model with attention in the input blocks {[*there.places]}, and this "
            f"one has it in {[*here.places]}"
        )
    for name in ("num_classes", "adm_in_channels"):
        if its.get(name) != unet.get(name):
            raise ValueError(
                f"{path} is for a model with {name}={its.get(name)!r}, and this one has "
                f"{unet.get(name)!r}"
            )
    latents = unet.get("out_channels", UNet.out_channels)
    wanted = unet.get("in_channels", UNet.in_channels)
    if (channels := its.get("in_channels", UNet.in_channels)) not in (latents, wanted):
        raise ValueError(
            f"{path} takes latents of {channels} channels, and this model's have {latents}"
        )
    factor = 2 ** (len(section["hint_channels"]) - 1)
    if "autoencoder" in config:
        side = make_autoencoder(config["autoencoder"]).downsampling
        if factor != side:
            raise ValueError(
                f"{path} takes hints {factor} times the size of the latents, and this model's "
                f"pictures are {side} times their size"
            )


def control_slots(
    section: dict[str, Any], layout: str, vector: str = "add_embedding"
) -> dict[str, Slot]:
    """The slot of each leaf of a ControlNet in a layout of `PREFIXES`: see `layout.slots`."""
    own = shapes(TASK, section)
    if layout == "native":
        return {path: Slot(shape, (path,), shape) for path, shape in own.items()}
    copied = {path: shape for path, shape in own.items() if not re.match(OWN, path)}
    table = slots("unet", section["unet"], layout, vector, leaves=copied)

    def slot(path, shape):
        if path in table:
            return table[path]
        name = names.name_of(TASK, path)
        if layout == "diffusers":
            name = names.diffusers_control_name(name, len(section["hint_channels"]))
        kernel = len(shape) == 4
        foreign = (shape[3], shape[2], *shape[:2]) if kernel else shape
        return Slot(shape, (name,), foreign, transposed=kernel)

    return {path: slot(path, shape) for path, shape in own.items()}


def _recognised(path: Path, state: Tensors) -> tuple[str, str]:
    """(layout, prefix) of a file that does not describe itself. ValueError if it is another."""
    prefix = PREFIXES["compvis"]
    prefix = prefix if any(name.startswith(prefix) for name in state) else ""
    bare = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
    for pattern, what in RELATIVES.items():
        if name := next((name for name in bare if re.match(pattern, name)), None):
            raise ValueError(f"{path} is {what}, which is not supported (it has {prefix}{name})")
    for layout, hint in HINTS.items():
        if hint in bare:
            return layout, prefix
    if prefix or any(name.startswith("controlnet_") for name in state):
        first = HINTS["compvis" if prefix else "diffusers"]
        raise ValueError(f"{path} holds no whole ControlNet: {prefix}{first} is missing")
    kinds = {re.escape(UNET): "a whole model or its UNet", r"input_blocks\.": "a UNet"}
    for pattern, what in (kinds | OTHERS).items():
        if name := next((name for name in state if re.match(pattern, name)), None):
            what = what.partition(":")[0]
            raise ValueError(f"{path} holds no ControlNet, but {what} (it has {name})")
    some, looked = ", ".join(list(state)[:3]), " and ".join(HINTS.values())
    raise ValueError(
        f"{path} holds no ControlNet: looked for {looked}; found {len(state)} tensors, such as "
        f"{some}"
    )


def _in_tensors(
    state: Tensors, layout: str, prefix: str, unet: dict[str, Any]
) -> tuple[dict[str, Any], Base]:
    """The section of a ControlNet whose tensors alone describe it, for a model with this `unet`."""
    found = Shapes(state, prefix)
    blocks = unet.get("num_res_blocks", UNet.num_res_blocks)
    if layout == "compvis":
        widths = (found.count(r"input_hint_block\.(\d+)\.") + 1) // 4
    else:
        widths = found.count(r"controlnet_cond_embedding\.blocks\.(\d+)\.") // 2 + 1

    def called(name):
        if layout == "compvis":
            return name
        return names.diffusers_unet_name(names.diffusers_control_name(name, widths), blocks)

    channels: list[int] = []
    while (name := called(f"zero_convs.{len(channels)}.0.weight")) in found:
        channels.append(found[name][0])
    middle = called("middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    context = found[middle][1] if middle in found else None
    norms = {i: called(f"input_blocks.{i}.1.norm.weight") for i in range(1, len(channels))}
    base = Base(context, tuple(channels), tuple(i for i, name in norms.items() if name in found))

    guided = called("time_embed.cond_proj.weight") in found
    fields = {key: v for key, v in lists(dict(unet)).items() if guided or key != GUIDED}
    fields["in_channels"] = found[called("input_blocks.0.0.weight")][1]
    hints = [found[called(f"input_hint_block.{4 * i}.weight")] for i in range(widths)]
    section = dict(hint_in=hints[0][1], hint_channels=[shape[0] for shape in hints], bgr=False)
    return section | dict(unet=fields), base


def _sources(path: Path, config: dict[str, Any]) -> tuple[Tensors, str, str, dict[str, Any]]:
    """(tensors, layout, prefix of their names, section) of a ControlNet that fits the model."""
    if path.is_dir() and not (path / FILE).is_file():
        about = path / "config.json"
        if not about.is_file() or "_class_name" not in load(about):
            inside = path / "controlnet"
            more = f"; there is one in {inside}" if (inside / "config.json").is_file() else ""
            raise FileNotFoundError(
                f"no ControlNet in {path}: it has neither {FILE}, which a run writes when it ends, "
                f"nor the config.json of one of diffusers{more}"
            )
        section = control_from(Json(about))
        _check_base(path, section, config)
        return open_shards(path, WEIGHTS), "diffusers", "", section
    path = path / FILE if path.is_dir() else path
    state = open_state(path)
    if is_ours(state):
        described = json.loads(state.metadata["config"])
        if TASK not in described:
            raise ValueError(f"{path} holds no ControlNet, but a model of ldm_jax")
        _check_base(path, described[TASK], config)
        return state, "native", PREFIXES["native"], described[TASK]
    layout, prefix = _recognised(path, state)
    if re.search(r"(^|[_-])shuffle([_.-]|$)", path.stem):
        raise ValueError(
            f"{path} is, by its name, the ControlNet of shuffled pictures, whose outputs are "
            "averaged over the picture: that is not supported"
        )
    try:
        section, base = _in_tensors(state, layout, prefix, config["unet"])
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    _check_base(path, section, config, base)
    return state, layout, prefix, section


def read_control(
    path: str | os.PathLike, config: dict[str, Any], dtype: Any = "float32"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(section, parameters) of a ControlNet for the model of `config`.

    The section has the fields of `ControlNet` as JSON values; its `unet` those of the UNet, whose
    `out_channels` are the model's. Parameters are nested arrays of `dtype`.

    Args:
      path: a folder of diffusers, or a run's workdir; one file of diffusers' or of the original
        code's layout, which may contain the model as well; or our own.

    Raises:
      FileNotFoundError: there is no such file or folder, or no ControlNet in the folder.
      ValueError: a file of something else, or of a kind of ControlNet that is not supported; one of
        another model; tensors that are missing, misshapen or not finite.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no ControlNet at {path}: there is no such file or folder")
    if "unet" not in config:
        raise ValueError(f"{path}: a ControlNet is for models with a UNet; this one has none")
    state, layout, prefix, section = _sources(path, config)
    table = control_slots(section, layout)
    params = read_whole(path, "ControlNet", state, table, prefix, dtype)
    latents = config["unet"].get("out_channels", UNet.out_channels)
    return section | dict(unet=section["unet"] | dict(out_channels=latents)), params


def read_whole(
    path: Path, what: str, state: Tensors, table: dict[str, Slot], prefix: str, dtype: Any
) -> dict[str, Any]:
    """As `read_params`; unused tensors are logged. Raises ValueError also for what is missing or
    misshapen; `what` is the network's name."""
    params, report = read_params(state, table, prefix, dtype)
    check_report(path, f"the {what}", report)
    return params


def write_control(
    path: str | os.PathLike,
    section: dict[str, Any],
    params: dict[str, Any],
    layout: str = "native",
    vector: str = "add_embedding",
) -> None:
    """Writes a ControlNet unchanged, whole or not at all; folders above `path` are made.

    Args:
      section, params: as `read_control` returns them.
      layout: "native" or "compvis" (one safetensors file), or "diffusers" (a folder for
        `ControlNetModel.from_pretrained`, which must be empty or not exist).
      vector: see `layout.slots`; only of diffusers' layout.

    Raises:
      FileExistsError: the folder is not empty.
      ValueError: an unknown layout, or one that cannot express this network; parameters of another.
    """
    if layout not in PREFIXES:
        raise ValueError(f"layout={layout!r}: choose one of {', '.join(PREFIXES)}")
    if layout == "compvis" and section["bgr"]:
        raise ValueError("layout='compvis' has no place for bgr=True: use 'native' or 'diffusers'")
    section, path = lists(section), Path(path).expanduser().absolute()
    tensors = write_params(params, control_slots(section, layout, vector), PREFIXES[layout])
    content = {}
    if layout == "diffusers":
        content = control_to(section, vector=vector, addition_time_embed_dim=SIZES)
    write_network(path, TASK, section, tensors, layout, content)


def write_network(
    path: Path,
    task: str,
    section: dict[str, Any],
    tensors: dict[str, np.ndarray],
    layout: str,
    content: dict[str, Any],
) -> None:
    """Writes a network alone: our file, one of the original code, or a folder of diffusers, whose
    JSON is `content`. Whole or not at all.

    Raises FileExistsError for a folder that is not empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if layout == "native":
        about = json.dumps({"task": task, task: section})
        about = {"format": FORMAT, "version": __version__, "config": about}
        return write_safetensors(path, tensors, about)
    if layout == "compvis":
        return write_safetensors(path, tensors, {"format": "pt"})
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty: nothing is written")
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        dump(part / "config.json", content)
        write_safetensors(part / f"{WEIGHTS}.safetensors", tensors, {"format": "pt"})
        os.replace(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
