"""Sections of a config that change a trained model: `adapters` and `inversion`."""

import dataclasses
from typing import Any


def read_section(config: Any, name: str, options: type) -> Any:
    """The section `name` as an object of the dataclass `options`; None if there is none.

    Raises ValueError for an option that does not exist, and beside settings that it excludes: it is
    of diffusion models, needs `init_from`, and nothing else may train.
    """
    if not config.get(name):
        return None
    section = dict(config[name])
    known = [field.name for field in dataclasses.fields(options)]
    if unknown := sorted(section.keys() - set(known)):
        raise ValueError(f"{name} has no option {unknown[0]!r}; it has {', '.join(known)}")
    if config.task != "diffusion":
        raise ValueError(f"{name}: for models of task='diffusion', not task={config.task!r}")
    if not config.init_from:
        raise ValueError(f"{name}: for a trained model; name it with init_from=PATH")
    if tuple(config.trainable) != (".*",):
        raise ValueError(
            f"trainable={tuple(config.trainable)}: with the section {name} nothing else trains; "
            "leave trainable at its default"
        )
    return options(**section)
