"""Which parameters train: the rest has no gradient, no optimiser state, no average."""

import re
from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

Params = dict[str, Any]


def split(params: Params, rules: Sequence[str]) -> tuple[Params, Params]:
    """(what trains, the rest), each a tree with the leaves that the other lacks.

    A leaf trains if one of `rules`, regular expressions, is found in its path
    ("unet/input_blocks_0_0/kernel").

    Raises:
      ValueError: a rule that matches nothing, or none that matches; lists the networks there are.
    """
    flat = flatten_dict(params, sep="/")
    for rule in rules:
        if not any(re.search(rule, path) for path in flat):
            raise ValueError(
                f"trainable: no parameter matches {rule!r}; paths look like "
                f"{', '.join(_examples(flat))}"
            )
    chosen = {path for path in flat if any(re.search(rule, path) for rule in rules)}
    if not chosen:
        raise ValueError(f"trainable: nothing trains; choose from {', '.join(_examples(flat))}")
    parts = (
        {path: leaf for path, leaf in flat.items() if (path in chosen) == trains}
        for trains in (True, False)
    )
    trained, rest = (unflatten_dict(part, sep="/") for part in parts)
    return trained, rest


def merge(a: Params, b: Params) -> Params:
    """The leaves of both trees; where both have one, that of `b`."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return b
    shared = {key: merge(a[key], b[key]) for key in a.keys() & b.keys()}
    return a | b | shared


def like(params: Params, chosen: Params) -> Params:
    """The leaves of `params` that `chosen` has, too."""
    if not isinstance(chosen, dict):
        return params
    return {key: like(params[key], value) for key, value in chosen.items()}


def _examples(flat: Params) -> list[str]:
    """One path of each network."""
    return list({path.split("/")[0]: path for path in reversed(flat)}.values())
