"""Our own file of what changes a model, a LoRA, an embedding, a ControlNet or a T2I-Adapter:
factors, vectors or a network, and the name of their base.

It is written and read as a whole model, `native.save_model`, with the section "base" in its config.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.interop import native
from ldm_jax.interop.changes import merge, separated
from ldm_jax.interop.hints import KINDS
from ldm_jax.interop.layout import Imported
from ldm_jax.models.tokens import ADDED

SAMPLED = 1024  # values of each kernel that the digest sees
UNET_ENDS = ("unet/input_blocks_0_0/kernel", "unet/out_2/kernel")  # of the base of a ControlNet


def about_base(
    path: str | os.PathLike, autoencoder: str, params: dict[str, Any], kernels: Iterable[str]
) -> dict[str, Any]:
    """The section "base": the absolute paths of a model and of an autoencoder in place of its own
    ("" if it is its own), and a digest of the kernels that are changed, or of `UNET_ENDS`."""
    bundled = os.path.realpath(path) == os.path.realpath(native.BUNDLED)
    return dict(
        path="" if bundled else os.path.abspath(os.path.expanduser(path)),
        autoencoder=os.path.abspath(os.path.expanduser(autoencoder)) if autoencoder else "",
        digest=_digest(params, kernels),
    )


def with_base(
    path: Path,
    config: dict[str, Any],
    factors: dict[str, Any],
    dtype: Any,
    open_base: Callable[..., Imported],
) -> Imported:
    """The whole model of a file with factors, vectors of a new token or a further network: its
    base, opened by `open_base`, and the change.

    Raises:
      FileNotFoundError: the base is not where it was.
      ValueError: another model is there.
    """
    config = dict(config)
    base = config.pop("base")
    rows = [name for name in flatten_dict(factors, sep="/") if f"/{ADDED}" in name]
    if "control" in factors:
        title = KINDS[config["conditioning"]["control"]["kind"]].title
        what, use = f"a {title}", f"--control={path.parent}:HINT"
    elif rows:
        what, use = "an embedding", f"--embedding={path.parent}"
    else:
        what, use = "a LoRA", f"--lora={path.parent}"
    place, instead = base["path"], f"draw with another by --model=PATH {use}"
    if place and not os.path.exists(place):
        raise FileNotFoundError(
            f"{path} holds {what} of {place}, which is not there: move it back, or {instead}"
        )
    found = open_base(place, dtype, autoencoder=base["autoencoder"])
    own = {name: part for name, part in factors.items() if name in found.params}
    vectors, changes = separated(own)
    tables = [f"{name.rpartition('/')[0]}/embedding" for name in rows]
    more = {name: factors[name] for name in ("control",) if name in factors}
    more = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.dtype(dtype)), more)
    if _digest(found.params, [*changes, *tables, *(UNET_ENDS if more else ())]) != base["digest"]:
        raise ValueError(
            f"{path} holds {what} of {place or 'the bundled model'}, where another model is now: "
            f"put the former there, or {instead}"
        )
    params = flatten_dict(merge(found.params, changes), sep="/", keep_empty_nodes=True)
    for name, leaf in flatten_dict(vectors, sep="/").items():
        params[name] = np.asarray(leaf, jnp.dtype(dtype))
    params = jax.tree.map(np.asarray, unflatten_dict(params, sep="/") | more)
    return Imported(config, params, f"{found.about}, with {what}", found.reports)


def _digest(params: dict[str, Any], kernels: Iterable[str]) -> str:
    """Of some values of these kernels, in bfloat16: the same for whatever type they are read in."""
    flat, digest = flatten_dict(params, sep="/"), hashlib.sha256()
    for path in sorted(kernels):
        kernel = np.asarray(flat[path]) if path in flat else np.zeros(0)
        stride = max(kernel.size // SAMPLED, 1)
        some = kernel.reshape(-1)[::stride].astype(jnp.bfloat16)
        digest.update(f"{path} {kernel.shape}".encode() + some.tobytes())
    return digest.hexdigest()
