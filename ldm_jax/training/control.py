"""A model learns to follow a hint: a ControlNet, a copy of the UNet's way down (Zhang et al. 2023),
or a T2I-Adapter, a small network of its own (Mou et al. 2023).

The section `control` of a config chooses it. This network is what trains, is averaged and is in
checkpoints. The model's own parameters are arguments of a step, without a gradient.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax

from ldm_jax.interop import control, t2i
from ldm_jax.interop.adapted import UNET_ENDS, about_base
from ldm_jax.interop.hints import KINDS, read_hinted
from ldm_jax.models.build import make_autoencoder
from ldm_jax.models.controlnet import CHANNELS
from ldm_jax.models.t2i_adapter import halvings
from ldm_jax.training.sections import read_section
from ldm_jax.training.trainable import merge

Params = dict[str, Any]
NAME = "control"  # of the network, of its condition, and of its entry of a batch
BLOCKS = 2  # residual blocks of a T2I-Adapter's level, as published


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `control`.

    Attributes:
      kind: "controlnet" or "t2i"; a T2I-Adapter has a map for each level of the UNet.
      hint_in: channels of a hint; grey hints get as many equal ones.
      hint_channels: widths of the hint's embedding, which halves its sides after each but the last;
        empty: as many of the published (16, 32, 96, 256) as the autoencoder halves, and one. Of a
        ControlNet.
      init_from: a ControlNet or a T2I-Adapter of the same model to start from, of whose kind the
        trained one is; empty: a copy of the UNet, or an adapter without effect.
    """

    kind: str = "controlnet"
    hint_in: int = 3
    hint_channels: tuple[int, ...] = ()
    init_from: str = ""


@dataclasses.dataclass(frozen=True)
class Control:
    """The ControlNet or T2I-Adapter of a run. Has the interface of `adapters.Adapters`.

    `section` is that of its condition. `fresh` makes parameters from a key.
    """

    section: dict[str, Any]
    fresh: Callable[[jax.Array], Params]
    base: dict[str, Any]

    @property
    def file(self) -> str:
        return KINDS[self.section["kind"]].file

    @property
    def networks(self) -> tuple[str, ...]:
        return (NAME,)

    def init(self, key: jax.Array, frozen: Params, loaded: Params) -> Params:
        """`loaded`, a copy of the UNet's way down for a ControlNet, and the rest fresh, so that it
        has no effect; or a whole network."""
        del frozen
        return merge({NAME: self.fresh(key)}, loaded)

    def scales(self) -> Params:
        """None: the parameters are what they are."""
        return {}

    def write(self, path: str | os.PathLike, params: Params, config: dict[str, Any]) -> None:
        """Writes the network alone, for `--control` and `ldm_jax.convert`."""
        del config
        write = KINDS[self.section["kind"]].write
        write(path, self.section["network"], jax.device_get(params[NAME]), "native")


def read_options(config: Any) -> Options | None:
    """The checked section `control` of a config; None if there is none.

    Raises ValueError for a value that is not allowed, and beside settings that it excludes.
    """
    options = read_section(config, "control", Options)
    if options is None:
        return None
    for other in ("adapters", "inversion"):
        if config.get(other):
            raise ValueError(f"control and {other} are two trainings: remove one of the sections")
    if options.hint_in < 1:
        raise ValueError(f"control.hint_in={options.hint_in}: choose a number above 0")
    if options.kind not in ("controlnet", "t2i"):
        raise ValueError(f"control.kind={options.kind!r}: choose one of controlnet, t2i")
    if options.kind == "t2i" and options.hint_channels:
        raise ValueError("control.hint_channels: a T2I-Adapter has none; its widths are the UNet's")
    return options


def with_control(
    resolved: dict[str, Any], autoencoder: dict[str, Any], options: Options
) -> tuple[dict[str, Any], Params]:
    """(The config of a model with a ControlNet or T2I-Adapter, the parameters of
    `options.init_from`).

    `autoencoder` is the section of the model's own.

    Raises ValueError for a model that has one, widths of another number, and as `read_hinted`.
    """
    if NAME in resolved["conditioning"]:
        raise ValueError(f"control: the model of init_from has a condition {NAME!r} already")
    if options.init_from:
        whole = dict(autoencoder=autoencoder) | resolved
        section, params = read_hinted(options.init_from, whole)
    else:
        make = _adapter if options.kind == "t2i" else _copied
        kind = t2i.TASK if options.kind == "t2i" else control.TASK
        network, params = make(resolved["unet"], autoencoder, options), {}
        section = dict(kind=kind, dropout=0.0, network=network)
    return resolved | {"conditioning": resolved["conditioning"] | {NAME: section}}, params


def _adapter(unet: dict[str, Any], autoencoder: dict[str, Any], options: Options) -> dict[str, Any]:
    """The section of a T2I-Adapter with a map for each level of the UNet."""
    places = t2i.places_of(dict(unet=unet, autoencoder=autoencoder))[:-1]
    channels, sizes = zip(*places, strict=True)
    return dict(
        channels=[*channels],
        halved=[*halvings(sizes)],
        hint_in=options.hint_in,
        factor=sizes[0],
        num_res_blocks=BLOCKS,
        light=False,
    )


def _copied(unet: dict[str, Any], autoencoder: dict[str, Any], options: Options) -> dict[str, Any]:
    """The section of a ControlNet that is a copy of the UNet."""
    factor = make_autoencoder(autoencoder).downsampling
    count = factor.bit_length()
    channels = options.hint_channels or (CHANNELS + CHANNELS[-1:] * count)[:count]
    if len(channels) != count:
        raise ValueError(
            f"control.hint_channels={tuple(channels)}: the autoencoder shrinks pictures {factor} "
            f"times, so give {count} widths"
        )
    unet = {name: value for name, value in unet.items() if name != "time_cond_proj_dim"}
    return dict(hint_in=options.hint_in, hint_channels=list(channels), bgr=False, unet=unet)


def make_control(
    section: dict[str, Any],
    fresh: Callable[[jax.Array], Params],
    given: Params,
    params: Params,
    start: str,
    autoencoder: str,
) -> tuple[Control, Params]:
    """(The network of a run on the model `params`, the parameters it starts from).

    Args:
      section: of its condition.
      fresh: see `Control`.
      given: a whole network to start from, or nothing.
      start, autoencoder: the paths `init_from` and `first_stage`.
    """
    shapes = jax.eval_shape(fresh, jax.random.key(0))
    if not given and section["kind"] == control.TASK:
        given = {name: part for name, part in params["unet"].items() if name in shapes}
    return Control(section, fresh, about_base(start, autoencoder, params, UNET_ENDS)), {NAME: given}
