"""The initial parameters of a run: fresh ones, or those of a model file."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.interop.layout import Imported

log = logging.getLogger(__name__)
Params = dict[str, Any]
# Kernels that may have more input channels than the weights: new channels start at 0, so the first
# outputs are unchanged (as for Stable Diffusion's inpainting model).
WIDENED = ("unet/input_blocks_0_0/kernel",)
SHOWN = 5


def loaded_parameters(
    abstract: Params, opened: Imported, path: str, networks: Sequence[str] = ()
) -> Params:
    """The leaves of a model that a file provides, float32; logs a line for each network.

    Args:
      abstract: shapes of all parameters, by network.
      opened: the file's content; `path` is its name in messages.
      networks: load only these; empty: all that the file has.

    Raises:
      ValueError: a leaf has another shape in the file, or one of `networks` is not in both.
    """
    for name in networks:
        if name not in abstract or name not in opened.params:
            where = "this model" if name not in abstract else path
            there = abstract if name not in abstract else opened.params
            raise ValueError(
                f"init_networks: {where} has no network {name!r}; it has {', '.join(there)}"
            )
    loaded, misfits = {}, []
    for name in abstract:
        wanted = flatten_dict({name: abstract[name]}, sep="/")
        there = flatten_dict({name: opened.params.get(name, {})}, sep="/")
        if networks and name not in networks:
            there = {}
        found, widened = {}, 0
        for leaf, like in wanted.items():
            if leaf not in there:
                continue
            value = np.asarray(there[leaf], np.float32)
            more = _more_inputs(leaf, value.shape, like.shape)
            if more:
                value = np.pad(value, [(0, 0), (0, 0), (0, more), (0, 0)])
                widened = more
            if value.shape != like.shape:
                misfits.append(f"{leaf} {list(value.shape)} there, {list(like.shape)} here")
            found[leaf] = value
        loaded.update(found)
        _say(name, wanted, found, len(there.keys() - wanted.keys()), widened, path)
    if misfits:
        more = f", and {len(misfits) - SHOWN} more" if len(misfits) > SHOWN else ""
        raise ValueError(
            f"init_from={path} is of another shape: {'; '.join(misfits[:SHOWN])}{more}"
        )
    unused = opened.params.keys() - abstract.keys() - {"autoencoder"}
    if unused:
        log.info("%s: left out %s, which this model has not", path, ", ".join(sorted(unused)))
    return unflatten_dict(loaded, sep="/")


def check_frozen(frozen: Params, loaded: Params) -> None:
    """Checks that every parameter trains or was loaded.

    Raises:
      ValueError: a parameter that does not train, and that no file provides.
    """
    given = flatten_dict(loaded, sep="/")
    random = [path for path in flatten_dict(frozen, sep="/") if path not in given]
    if random:
        networks = ", ".join(dict.fromkeys(path.split("/")[0] for path in random))
        raise ValueError(
            f"trainable leaves {networks} frozen at random numbers ({random[0]} and "
            f"{len(random) - 1} more): give weights with init_from=PATH, or let it train"
        )


def _more_inputs(leaf: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> int:
    """The number of input channels to add to a kernel; 0 for none."""
    if leaf not in WIDENED or len(given) != 4 or len(wanted) != 4:
        return 0
    same = given[:2] == wanted[:2] and given[3] == wanted[3]
    return wanted[2] - given[2] if same and given[2] < wanted[2] else 0


def _say(name, wanted, found, extra, widened, path):
    total = sum(int(np.prod(leaf.shape)) for leaf in wanted.values())
    count = sum(leaf.size for leaf in found.values())
    parts = [f"{count:,} parameters loaded from {path}"] if found else []
    if count < total:
        parts.append(f"{total - count:,} fresh")
    if widened:
        parts.append(f"{widened} input channels added, at 0")
    if extra:
        parts.append(f"{extra} tensors of the file left out")
    log.info("%s: %s", name, ", ".join(parts))
