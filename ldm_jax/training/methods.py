"""Ways to train a loaded model other than whole, each with its section of a config.

`adapters` (LoRA), `inversion` (a new token), `control` (ControlNet, T2I-Adapter) and `distill` (a
student).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from ldm_jax.interop.layout import Imported
from ldm_jax.training import adapters, control, distillation, inversion
from ldm_jax.training.initialise import check_frozen

Params = dict[str, Any]
Adapters = adapters.Adapters | inversion.Inversion | control.Control


@dataclasses.dataclass(frozen=True)
class Methods:
    """The `Options` of each section's module; None for a section that a config does not have."""

    adapters: Any = None
    inversion: Any = None
    control: Any = None
    distill: Any = None

    def __bool__(self) -> bool:
        return any(vars(self).values())

    @property
    def trainable(self) -> tuple[str, ...] | None:
        """In place of the config's."""
        return distillation.STUDENT if self.distill and not self.adapters else None


def read_methods(config: Any) -> Methods:
    """The checked sections of a config. Raises ValueError as `read_options` of each."""
    rooms = dict(adapters=adapters, inversion=inversion, control=control, distill=distillation)
    return Methods(**{name: room.read_options(config) for name, room in rooms.items()})


def changed_config(
    methods: Methods, resolved: dict[str, Any], opened: Imported | None
) -> tuple[dict[str, Any], Params]:
    """(The config of the networks in training, parameters of further files to start from).

    `resolved` is that of the loaded model, and `opened` its file.
    """
    given: Params = {}
    if methods.inversion:
        resolved = inversion.with_new_token(resolved, methods.inversion)
    if methods.control:
        own = resolved.get("autoencoder") or opened.config["autoencoder"]
        resolved, given = control.with_control(resolved, own, methods.control)
    if methods.distill:
        resolved = distillation.student_config(resolved, methods.distill)
    return resolved, given


def begin(
    methods: Methods,
    resolved: dict[str, Any],
    fresh: Callable[[jax.Array], Params],
    loaded: Params,
    frozen: Params,
    given: Params,
    paths: tuple[str, str],
) -> tuple[Adapters | None, Params, Params]:
    """(what trains beside the model, parameters that do not train, first values of those that do).

    Args:
      resolved: as `changed_config` returns it.
      fresh: makes the parameters of all networks from a key.
      loaded, frozen: of the loaded model, those that would train and the others.
      given: see `changed_config`.
      paths: `init_from` and `first_stage`.
    """
    shapes, beside = jax.eval_shape(fresh, jax.random.key(0)), None
    if methods.distill and not methods.adapters:
        frozen = frozen | {distillation.TEACHER: loaded["unet"]}
        loaded = distillation.as_teacher(loaded, shapes)
    if methods.adapters:
        check_frozen(shapes, loaded)
        beside, frozen, loaded = adapters.make_adapters(methods.adapters, loaded, resolved, *paths)
    if methods.inversion:
        made = inversion.make_inversion(methods.inversion, loaded, resolved, *paths)
        beside, frozen, loaded = made
        check_frozen(shapes, frozen)
    if methods.control:
        name = control.NAME
        frozen = {network: part for network, part in loaded.items() if network != name}
        check_frozen({network: part for network, part in shapes.items() if network != name}, frozen)
        section = resolved["conditioning"][name]
        made = (section, lambda key: fresh(key)[name], given, frozen)
        beside, loaded = control.make_control(*made, *paths)
    return beside, frozen, loaded
