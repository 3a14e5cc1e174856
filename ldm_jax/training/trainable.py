"""Splits parameters into those that train and the rest, without gradient, optimiser or average."""

import re
from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

Params = dict[str, Any]


def split(params: Params, rules: Sequence[str]) -> tuple[Params, Params]:
    """(parameters that train, the rest): two trees that share no leaf.

    A leaf trains if one of `rules`, regular expressions, is found in its path
    ("unet/input_blocks_0_0/kernel").

    Raises:
      ValueError: a rule matches nothing, or there is none; lists the networks.
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
    """The leaves of both trees; if both have a leaf, that of `b`."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return b
    shared = {key: merge(a[key], b[key]) for key in a.keys() & b.keys()}
    return a | b | shared


def like(params: Params, chosen: Params) -> Params:
    """The leaves of `params` that `chosen` has as well."""
    if not isinstance(chosen, dict):
        return params
    return {key: like(params[key], value) for key, value in chosen.items() if key in params}


def _examples(flat: Params) -> list[str]:
    """One path of each network."""
    return list({path.split("/")[0]: path for path in reversed(flat)}.values())
