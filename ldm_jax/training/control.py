"""A ControlNet: a copy of the UNet's way down learns to follow a hint (Zhang et al. 2023).

The section `control` of a config chooses it. The copy is a network of its own: what trains, is
averaged and is in checkpoints. The model's own parameters are arguments of a step, without a
gradient.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax

from ldm_jax.interop.adapted import UNET_ENDS, about_base
from ldm_jax.interop.control import FILE, read_control, write_control
from ldm_jax.models.build import make_autoencoder
from ldm_jax.models.controlnet import CHANNELS
from ldm_jax.training.sections import read_section
from ldm_jax.training.trainable import merge

Params = dict[str, Any]
NAME = "control"  # of the network, of its condition, and of its entry of a batch


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `control`.

    Attributes:
      hint_in: channels of a hint; grey hints get as many equal ones.
      hint_channels: widths of the hint's embedding, which halves its sides after each but the last;
        empty: as many of the published (16, 32, 96, 256) as the autoencoder halves, and one.
      init_from: a ControlNet of the same model to start from; empty: a copy of the UNet.
    """

    hint_in: int = 3
    hint_channels: tuple[int, ...] = ()
    init_from: str = ""


@dataclasses.dataclass(frozen=True)
class Control:
    """The ControlNet of a run. Has the interface of `adapters.Adapters`.

    `section` is that of its network. `fresh` makes parameters from a key.
    """

    section: dict[str, Any]
    fresh: Callable[[jax.Array], Params]
    base: dict[str, Any]
    file: str = FILE

    @property
    def networks(self) -> tuple[str, ...]:
        return (NAME,)

    def init(self, key: jax.Array, frozen: Params, loaded: Params) -> Params:
        """`loaded`, a copy of the UNet's way down, and the rest fresh, so that it has no effect; or
        a whole ControlNet."""
        del frozen
        return merge({NAME: self.fresh(key)}, loaded)

    def scales(self) -> Params:
        """None: the parameters are what they are."""
        return {}

    def write(self, path: str | os.PathLike, params: Params, config: dict[str, Any]) -> None:
        """Writes the ControlNet alone, for `--control` and `ldm_jax.convert`."""
        del config
        write_control(path, self.section, jax.device_get(params[NAME]), "native")


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
    return options


def with_control(
    resolved: dict[str, Any], autoencoder: dict[str, Any], options: Options
) -> tuple[dict[str, Any], Params]:
    """(The config of a model with a ControlNet, the parameters of `options.init_from`).

    `autoencoder` is the section of the model's own.

    Raises ValueError for a model that has one, widths of another number, and as `read_control`.
    """
    if NAME in resolved["conditioning"]:
        raise ValueError(f"control: the model of init_from has a condition {NAME!r} already")
    if options.init_from:
        network, params = read_control(options.init_from, resolved)
    else:
        network, params = _copied(resolved["unet"], autoencoder, options), {}
    section = dict(kind="control", dropout=0.0, network=network)
    return resolved | {"conditioning": resolved["conditioning"] | {NAME: section}}, params


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
    """(The ControlNet of a run on the model `params`, the parameters it starts from).

    Args:
      section: of its network.
      fresh: see `Control`.
      given: a whole ControlNet to start from, or nothing.
      start, autoencoder: the paths `init_from` and `first_stage`.
    """
    shapes = jax.eval_shape(fresh, jax.random.key(0))
    given = given or {name: part for name, part in params["unet"].items() if name in shapes}
    return Control(section, fresh, about_base(start, autoencoder, params, UNET_ENDS)), {NAME: given}
