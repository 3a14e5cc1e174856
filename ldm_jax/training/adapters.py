"""LoRA: factors beside the kernels of a loaded model train, and the model itself does not.

The section `adapters` of a config chooses them. The factors are parameters of their own, at
"unet/…/to_q/lora_down" beside "unet/…/to_q/kernel": what trains, is averaged and is in checkpoints.
The layers add their products, see `models.low_rank`.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.interop.adapted import about_base
from ldm_jax.interop.changes import scale_of
from ldm_jax.interop.lora_writer import LAYOUTS, PREFIXES, layer_names, write_lora
from ldm_jax.models.layers import uniform_init
from ldm_jax.models.low_rank import DOWN, MAGNITUDE, SCALE, UP
from ldm_jax.training.sections import read_section
from ldm_jax.training.trainable import merge

Params = dict[str, Any]
KINDS = ("lora", "dora")


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `adapters`.

    Attributes:
      rank: columns of `down` and rows of `up`; 0 < rank ≤ the smaller side of each kernel.
      alpha: the change of a kernel is alpha/rank·down·up.
      targets: regular expressions on paths such as "unet/input_blocks_1_1/proj_in/kernel": the
        kernels, of the UNet and of text encoders, matrices and convolutions, that get factors.
      kind: "lora", or "dora", in which the norms of the changed kernel train as well.
      rslora: alpha/√rank in place of alpha/rank.
      layout: of `lora.safetensors`, "kohya" or "peft".
    """

    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = (r"^unet/.*/attn[12]/",)
    kind: str = "lora"
    rslora: bool = False
    layout: str = "kohya"

    @property
    def scale(self) -> np.float32:
        return scale_of(self.alpha, self.rank, self.rslora)


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The factors of a run: their options, the paths of the kernels they change, and the section
    "base" of the exported file; `file` is what `write` is given."""

    options: Options
    kernels: tuple[str, ...]
    base: dict[str, Any]
    file: str = "lora.safetensors"

    @property
    def networks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path.partition("/")[0] for path in self.kernels))

    def init(self, key: jax.Array, frozen: Params, loaded: Params) -> Params:
        """Factors for the kernels in `frozen`: `down` as PyTorch initialises layers, `up` 0, so
        that nothing is changed yet; and, `loaded`, the norms of DoRA."""
        flat, made = flatten_dict(frozen, sep="/"), {}
        for i, path in enumerate(self.kernels):
            shape, layer = flat[path].shape, path.removesuffix("kernel")
            down = (*shape[:-1], self.options.rank)
            made[layer + DOWN] = uniform_init(jax.random.fold_in(key, i), down, jnp.float32)
            made[layer + UP] = jnp.zeros((self.options.rank, shape[-1]), jnp.float32)
        return merge(unflatten_dict(made, sep="/"), loaded)

    def scales(self) -> Params:
        """The number beside each kernel by which its factors' product is multiplied."""
        scale = self.options.scale
        leaves = {path.removesuffix("kernel") + SCALE: scale for path in self.kernels}
        return unflatten_dict(leaves, sep="/")

    def write(self, path: str | os.PathLike, factors: Params, config: dict[str, Any]) -> None:
        """Writes a LoRA file for the model of `config`."""
        options = self.options
        factors = jax.device_get(factors)
        write_lora(path, factors, config, options.alpha, options.rslora, options.layout)


def read_options(config: Any) -> Options | None:
    """The checked section `adapters` of a config; None if there is none.

    Raises ValueError for a value that is not allowed, and beside settings that it excludes.
    """
    options = read_section(config, "adapters", Options)
    if options is None:
        return None
    if not isinstance(options.rank, int) or isinstance(options.rank, bool) or options.rank < 1:
        raise ValueError(f"adapters.rank={options.rank}: choose a whole number above 0")
    if not (math.isfinite(options.alpha) and options.alpha > 0):
        raise ValueError(f"adapters.alpha={options.alpha}: choose a number above 0")
    for name, choices in (("kind", KINDS), ("layout", tuple(LAYOUTS))):
        if getattr(options, name) not in choices:
            raise ValueError(
                f"adapters.{name}={getattr(options, name)!r}: choose one of {', '.join(choices)}"
            )
    return options


def make_adapters(
    options: Options, params: Params, config: dict[str, Any], start: str, autoencoder: str
) -> tuple[Adapters, Params, Params]:
    """(adapters, parameters that do not train, initial values of those that do).

    Args:
      params: of the loaded model.
      config: of its networks.
      start, autoencoder: the paths `init_from` and `first_stage`.

    Raises ValueError for targets that match no kernel, a rank above that of a kernel, or kernels
    that have no name in the layout.
    """
    flat = flatten_dict(params, sep="/")
    kernels = _chosen(flat, options.targets)
    for path in kernels:
        *inputs, outputs = flat[path].shape
        if options.rank > (most := min(math.prod(inputs), outputs)):
            raise ValueError(
                f"adapters.rank={options.rank}: {path} of shape {flat[path].shape} has at most "
                f"rank {most}; choose a smaller rank, or targets without it"
            )
    layer_names(config, kernels, options.layout)  # an error here, not after the training
    adapters = Adapters(options, tuple(kernels), about_base(start, autoencoder, params, kernels))
    magnitudes = {}
    if options.kind == "dora":
        for path in kernels:
            squares = np.square(np.asarray(flat[path], np.float32))
            norm = np.sqrt(squares.reshape(-1, squares.shape[-1]).sum(0, np.float64))
            magnitudes[path.removesuffix("kernel") + MAGNITUDE] = norm.astype(np.float32)
    return adapters, merge(params, adapters.scales()), unflatten_dict(magnitudes, sep="/")


def _chosen(flat: dict[str, Any], targets: Sequence[str]) -> list[str]:
    """The paths of the kernels that a target matches, in the order of the parameters."""
    able = [p for p in flat if p.endswith("/kernel") and p.partition("/")[0] in PREFIXES]
    kinds: dict[str, dict[str, None]] = {}
    for path in able:
        network, *_, layer, _ = path.split("/")
        kinds.setdefault(network, {})[layer] = None
    there = "; ".join(f"{network}: {', '.join(layers)}" for network, layers in kinds.items())
    for target in targets or ("",):
        if not target or not any(re.search(target, path) for path in able):
            what = f"nothing matches {target!r}" if target else "there are none"
            raise ValueError(
                f"adapters.targets: {what}; paths look like {able[0]!r}, and the layers are of "
                f"{there}"
            )
    return [path for path in able if any(re.search(target, path) for target in targets)]
