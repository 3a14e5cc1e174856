"""LPIPS from the files people have: torchvision's VGG-16 or AlexNet, and the heads of `lpips`."""

import os
import re
from pathlib import Path

import numpy as np

from ldm_jax.interop.files import Tensors, open_state
from ldm_jax.models.lpips import CONVOLUTIONS_PER_STAGE

# Our convolutions in order, and their places in torchvision's `features`.
_VGG = [f"conv{s}_{i}" for s, n in enumerate(CONVOLUTIONS_PER_STAGE, 1) for i in range(1, n + 1)]
TRUNKS = {
    "vgg": dict(zip(_VGG, (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), strict=True)),
    "alex": {f"alex{i}": place for i, place in enumerate((0, 3, 6, 8, 10), 1)},
}
_HEADS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}


def load_lpips(path: str | os.PathLike, heads: str | os.PathLike = "") -> dict[str, np.ndarray]:
    """Parameters of `ldm_jax.models.lpips.lpips`, float32.

    Args:
      path: torchvision's VGG-16 or AlexNet (`features.0.weight` …); or the whole module of `lpips`
        (`net.slice1.0.weight` …, `lin0.model.1.weight` …); or what `scripts/build_lpips.py` writes.
      heads: of a network of torchvision, `vgg.pth` or `alex.pth` of `lpips`, version 0.1.

    Raises:
      FileNotFoundError, ValueError: a file that cannot be read, of another network, or without
        heads; or heads of another network.
    """
    weights = open_state(Path(path).expanduser())
    if "conv1_1/kernel" in weights:
        return {name: weights[name].astype(np.float32) for name in weights}
    # Of every layer the place in `features`: the heads have other names.
    found = {}
    for name in weights:
        if match := re.fullmatch(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)", name):
            found[int(match[1]), match[2]] = name
    shape = weights.shape(found[0, "weight"]) if (0, "weight") in found else ()
    kinds = {(64, 3, 3, 3): "vgg", (64, 3, 11, 11): "alex"}
    kind = kinds.get(tuple(shape))
    places = TRUNKS.get(kind, {})
    if kind is None or any((place, "bias") not in found for place in places.values()):
        raise ValueError(
            f"{path} is neither VGG-16 nor AlexNet of torchvision (features.0.weight …), nor the "
            f"module of lpips (net.slice1.0.weight …): it holds {len(weights)} tensors, such as "
            f"{', '.join(list(weights)[:3])}"
        )
    params = {}
    for ours, place in places.items():
        kernel = weights[found[place, "weight"]].astype(np.float32)
        params[f"{ours}/kernel"] = kernel.transpose(2, 3, 1, 0)
        params[f"{ours}/bias"] = weights[found[place, "bias"]].astype(np.float32)
    if not heads and "lin0.model.1.weight" not in weights:
        raise ValueError(
            f"{path} is a network without LPIPS's heads: name the file of them too, {kind}.pth of "
            "the package lpips, after a comma"
        )
    return params | _read_heads(open_state(Path(heads).expanduser()) if heads else weights, kind)


def _read_heads(weights: Tensors, kind: str) -> dict[str, np.ndarray]:
    heads = {}
    for i, width in enumerate(_HEADS[kind]):
        name = f"lin{i}.model.1.weight"
        if name not in weights or weights.shape(name)[1] != width:
            what = f"of shape {weights.shape(name)}" if name in weights else "missing"
            raise ValueError(
                f"{name} is {what}: the heads of {kind} have widths {_HEADS[kind]}, as in "
                f"{kind}.pth of the package lpips"
            )
        heads[f"lin{i}"] = weights[name].astype(np.float32).reshape(-1)
    return heads
