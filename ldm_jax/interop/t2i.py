"""T2I-Adapters: read for a model, from any layout, and written.

Layouts: "native" is our own file, which describes itself; "diffusers" a folder, or its weights
alone; "compvis" one file of the original code. Tensors alone have no size of the hint's squares and
no place where a map is halved: they are then those of the model. `models.t2i_adapter` is the
network, and its names are in `names`.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm_jax.interop import names
from ldm_jax.interop.control import read_whole, write_network
from ldm_jax.interop.diffusers.components import VERSION, Json
from ldm_jax.interop.diffusers.reading import WEIGHTS
from ldm_jax.interop.families import lists
from ldm_jax.interop.fields import Shapes
from ldm_jax.interop.files import Tensors, open_shards, open_state
from ldm_jax.interop.layout import Slot, shapes, write_params
from ldm_jax.interop.native import is_ours
from ldm_jax.models.build import make_autoencoder, tuples
from ldm_jax.models.t2i_adapter import feature_places, halvings
from ldm_jax.models.unet import UNet
from ldm_jax.published import MODELS

FILE = "t2i_adapter.safetensors"  # in a workdir
TASK = "t2i"  # of our file's config, whose section of this name is the network's
CLASS = "T2IAdapter"  # of diffusers
# Of the tensors' names, by layout.
PREFIXES = {"native": f"{TASK}/", "diffusers": "adapter.", "compvis": ""}
# By the names of its tensors.
LAYOUTS = {
    r"adapter\.body\.\d+\.(in_conv|resnets)\.": "diffusers",
    r"body\.\d+\.(in_conv|block1|body)\.": "compvis",
}
# Networks that were published beside T2I-Adapters, by tensors that only these have.
RELATIVES = {
    r"spatial_feat_mapping\.": "the fuser of several T2I-Adapters (CoAdapter)",
    r"style_embedding": "T2I-Adapter's style adapter, whose hint is a picture's CLIP features",
}
FIRST = ("sd1", "sdxl-base")  # of MODELS: those that adapters were published for
Section = dict[str, Any]
Places = list[tuple[int, int]]  # as of `feature_places`, but over the picture


def layout_of(state: Tensors) -> str:
    """The layout of a file of other software with a T2I-Adapter; "" if there is none."""
    for pattern, layout in LAYOUTS.items():
        if any(re.match(pattern, name) for name in state):
            return layout
    return ""


def places_of(config: Section) -> Places:
    """(channels, pixels over the map's) of each map that a model's UNet takes."""
    side = make_autoencoder(config["autoencoder"]).downsampling
    return [(c, side * size) for c, size in feature_places(UNet(**tuples(config["unet"])))]


def _sizes(section: Section) -> list[int]:
    """Pixels over those of each map."""
    halved = [sum(h <= i for h in section["halved"]) for i in range(len(section["channels"]))]
    return [section["factor"] * 2**count for count in halved]


def _such(fits: Callable[[Places], bool]) -> str:
    """ ", such as TITLE": a published model whose maps fit."""
    for model in map(MODELS.get, (*FIRST, *MODELS)):
        stage = dict(autoencoder=dict(model.autoencoder.fields))
        if fits(places_of(stage | dict(unet=model.unet))):
            return f", such as {model.title}"
    return ""


def _check_base(path: Path, section: Section, config: Section) -> None:
    """Raises ValueError for an adapter of another model."""
    there = [*zip(section["channels"], _sizes(section), strict=True)]
    here = places_of(config)[: len(there)]
    if there == here:
        return
    such = _such(lambda places: places[: len(there)] == there)
    its, ours = ([", ".join(map(str, row)) for row in zip(*p, strict=True)] for p in (there, here))
    if its[0] != ours[0]:
        raise ValueError(
            f"{path} is for a model whose levels have {its[0]} channels{such}, and this one's have "
            f"{ours[0]}"
        )
    raise ValueError(
        f"{path} is for a model whose levels are {its[1]} times smaller than the picture{such}, "
        f"and this one's are {ours[1]} times"
    )


def t2i_slots(section: Section, layout: str) -> dict[str, Slot]:
    """The slot of each leaf of a T2I-Adapter in a layout of `PREFIXES`: see `layout.slots`."""

    def slot(path, shape):
        if layout == "native":
            return Slot(shape, (path,), shape)
        name = names.t2i_name(path, layout, section["num_res_blocks"], section["light"])
        kernel = len(shape) == 4
        foreign = (shape[3], shape[2], *shape[:2]) if kernel else shape
        return Slot(shape, (name,), foreign, transposed=kernel)

    return {path: slot(path, shape) for path, shape in shapes(TASK, section).items()}


def _in_tensors(state: Tensors, layout: str, config: Section) -> Section:
    """The section of an adapter whose tensors alone describe it, for the model of `config`.

    Raises ValueError for an adapter of another model, without the path.
    """
    found, places = Shapes(state, PREFIXES[layout]), places_of(config)
    light, count = "body.0.out_conv.weight" in found, found.count(r"body\.(\d+)\.")
    if light or layout == "diffusers":
        last = "out_conv" if light else "resnets.0.block1"
        channels = [found[f"body.{i}.{last}.weight"][0] for i in range(count)]
        blocks = found.count(r"body\.0\.(?:resnets|body)\.(\d+)\.")
    else:
        widths = [found[f"body.{i}.block1.weight"][0] for i in range(count)]
        blocks = _blocks(widths, [channels for channels, _ in places])
        channels = widths[::blocks]
    first = "body.0.in_conv.weight" if light else "conv_in.weight"
    numbers, (_, factor) = found[first][1], places[0]
    if numbers not in (factor**2, 3 * factor**2):

        def fits(its: Places) -> bool:
            same = [c for c, _ in its[: len(channels)]] == channels
            return same and numbers in (its[0][1] ** 2, 3 * its[0][1] ** 2)

        raise ValueError(
            f"is for a model whose first map has a value for {numbers} numbers of the hint"
            f"{_such(fits)}, and this one's for {factor**2}, or {3 * factor**2} in colour"
        )
    return dict(
        channels=channels,
        halved=[*halvings([size for _, size in places[: len(channels)]])],
        hint_in=numbers // factor**2,
        factor=factor,
        num_res_blocks=blocks,
        light=light,
    )


def _blocks(widths: list[int], wanted: list[int]) -> int:
    """The number of residual blocks of a level, of those of all levels in one list.

    No tensor says it where neighbours are equally wide: the model's levels do, of which `wanted`
    are the widths, with that of its middle.
    """

    def levels(blocks):
        return len(widths) // blocks

    fit = [
        n
        for n in range(1, len(widths) + 1)
        if [w for w in wanted[: levels(n)] for _ in range(n)] == widths
    ]
    first = next((i for i, width in enumerate(widths) if width != widths[0]), len(widths))
    return min(fit, key=lambda n: abs(levels(n) - (len(wanted) - 1)), default=first)


def _from_json(content: Json) -> Section:
    """The section of an adapter of diffusers."""
    if content.class_name != CLASS:
        raise content.error("_class_name", content.class_name, repr(CLASS))
    kind = content.take("adapter_type", "full_adapter")
    if kind not in ("full_adapter", "full_adapter_xl", "light_adapter"):
        known = "'full_adapter', 'full_adapter_xl' or 'light_adapter'"
        raise content.error("adapter_type", kind, known)
    channels = content.take("channels", [320, 640, 1280, 1280])
    if not isinstance(channels, list) or not channels or not all(map(_positive, channels)):
        raise content.error("channels", channels, "a list of numbers above 0")
    defaults = dict(in_channels=3, downscale_factor=8, num_res_blocks=2)
    numbers = {key: content.take(key, default) for key, default in defaults.items()}
    for key, number in numbers.items():
        if not _positive(number):
            raise content.error(key, number, "a number above 0")
    content.done()
    light = kind == "light_adapter"
    channels = channels + channels[-1:] if light else channels
    return dict(
        channels=channels,
        halved=_halved(kind, len(channels)),
        hint_in=numbers["in_channels"],
        factor=numbers["downscale_factor"],
        num_res_blocks=numbers["num_res_blocks"],
        light=light,
    )


def _positive(number: Any) -> bool:
    return isinstance(number, int) and number > 0


def _halved(kind: str, count: int) -> list[int]:
    """The blocks of an adapter of diffusers that halve."""
    return [2][: max(count - 2, 0)] if kind == "full_adapter_xl" else [*range(1, count)]


def _to_json(section: Section) -> Section:
    """Raises ValueError for an adapter that diffusers has no type for."""
    channels, halved = [*section["channels"]], [*section["halved"]]
    kind = None
    if section["light"]:
        if channels[-2:-1] == channels[-1:] and halved == _halved("", len(channels)):
            kind, channels = "light_adapter", channels[:-1]
    elif halved == _halved("full_adapter", len(channels)):
        kind = "full_adapter"
    elif halved == _halved("full_adapter_xl", len(channels)) and len({*channels[2:]}) < 2:
        kind = "full_adapter_xl"
    if kind is None:
        light = "light, " * section["light"]
        raise ValueError(
            f"layout='diffusers' has no adapter_type for {light}channels={channels} halved at "
            f"{halved}: use 'native'"
        )
    return dict(
        _class_name=CLASS,
        _diffusers_version=VERSION,
        adapter_type=kind,
        channels=channels,
        downscale_factor=section["factor"],
        in_channels=section["hint_in"],
        num_res_blocks=section["num_res_blocks"],
    )


def read_t2i(
    path: str | os.PathLike, config: Section, dtype: Any = "float32"
) -> tuple[Section, dict[str, Any]]:
    """(section, parameters) of a T2I-Adapter for the model of `config`.

    The section has the fields of `T2IAdapter` as JSON values. Parameters are nested arrays of
    `dtype`.

    Args:
      path: a folder of diffusers, or a run's workdir; one file of diffusers' or of the original
        code's layout; or our own.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file of something else; an adapter of another model; tensors that are missing,
        misshapen or not finite.
    """
    path = Path(path).expanduser()
    if "unet" not in config or "autoencoder" not in config:
        raise ValueError(f"{path}: a T2I-Adapter is for whole models with a UNet")
    if path.is_dir() and not (path / FILE).is_file():
        section, layout = _from_json(Json(path / "config.json")), "diffusers"
        _check_base(path, section, config)
        state = open_shards(path, WEIGHTS)
    else:
        path = path / FILE if path.is_dir() else path
        state = open_state(path)
        layout = "native" if is_ours(state) else layout_of(state)
        if layout == "native":
            described = json.loads(state.metadata["config"])
            if TASK not in described:
                raise ValueError(f"{path} holds no T2I-Adapter, but a model of ldm_jax")
            section = described[TASK]
        elif layout:
            try:
                section = _in_tensors(state, layout, config)
            except ValueError as error:
                raise ValueError(f"{path} {error}") from None
        else:
            some = ", ".join([*state][:3])
            raise ValueError(
                f"{path} holds no T2I-Adapter: looked for body.0.* and adapter.body.0.*; found "
                f"{len(state)} tensors, such as {some}"
            )
        _check_base(path, section, config)
    table = t2i_slots(section, layout)
    return section, read_whole(path, "T2I-Adapter", state, table, PREFIXES[layout], dtype)


def write_t2i(
    path: str | os.PathLike, section: Section, params: dict[str, Any], layout: str = "native"
) -> None:
    """Writes a T2I-Adapter unchanged, whole or not at all; folders above `path` are made.

    Args:
      section, params: as `read_t2i` returns them.
      layout: "native" or "compvis" (one safetensors file), or "diffusers" (a folder for
        `T2IAdapter.from_pretrained`, which must be empty or not exist).

    Raises:
      FileExistsError: the folder is not empty.
      ValueError: an unknown layout, or one that cannot express this network; parameters of another.
    """
    if layout not in PREFIXES:
        raise ValueError(f"layout={layout!r}: choose one of {', '.join(PREFIXES)}")
    section, path = lists(section), Path(path).expanduser().absolute()
    content = _to_json(section) if layout == "diffusers" else {}
    tensors = write_params(params, t2i_slots(section, layout), PREFIXES[layout])
    write_network(path, TASK, section, tensors, layout, content)
