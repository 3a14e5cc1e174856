"""FID's Inception-v3 from a file: `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, or
`inception_v3_weights_fid.pickle` of jax-fid, which JAX codes pass around."""

from typing import Any

import numpy as np

from ldm_jax.interop.files import Entry, Tensors
from ldm_jax.models.inception import CLASSES, WIDTH

KEY = "Mixed_7c.branch3x3dbl_3b.conv.weight"
JAX_KEY = "Mixed_7c/branch3x3dbl_3b/conv/kernel"
_JAX_FID = "jax-fid"
_EPSILON = 1e-3
# Leaves of jax-fid's layers → torch's.
_LEAVES = {
    "conv/kernel": "conv.weight",
    "bn/scale": "bn.weight",
    "bn/bias": "bn.bias",
    "bn/mean": "bn.running_mean",
    "bn/var": "bn.running_var",
    "fc/kernel": "fc.weight",
    "fc/bias": "fc.bias",
}


def read_inception(weights: Tensors) -> dict[str, Any]:
    """Parameters of `InceptionV3`: W' = W γ / √(var + ε), b' = β − mean γ / √(var + ε).

    Raises:
      ValueError: the network has other classes, as torchvision's own has, or a tensor is missing.
    """
    if "fc.weight" not in weights and not features_alone(weights):
        raise ValueError(f"{weights.place(KEY).rpartition(':')[0]} lacks fc.weight, the classifier")
    if "fc.weight" in weights and weights.shape("fc.weight") != (CLASSES, WIDTH):
        raise ValueError(
            f"{weights.place('fc.weight')} has shape {weights.shape('fc.weight')}: this is not the "
            f"Inception-v3 of FID, which has {CLASSES} classes (pt_inception-2015-12-05-6726825d"
            ".pth); torchvision's own makes other features"
        )
    unused = np.zeros((CLASSES, WIDTH), np.float32)
    params: dict[str, Any] = {"fc": {"kernel": weights.get("fc.weight", unused).T}}
    for name in weights:
        path, _, leaf = name.rpartition(".conv.")
        if leaf != "weight" or path.startswith("AuxLogits"):
            continue
        gain, bias, mean, variance = (
            weights[f"{path}.bn.{k}"].astype(np.float64)
            for k in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gain / np.sqrt(variance + _EPSILON)
        folded = {
            "kernel": (weights[name].transpose(2, 3, 1, 0) * scale).astype(np.float32),
            "bias": (bias - mean * scale).astype(np.float32),
        }
        block, _, branch = path.partition(".")
        if branch:
            params.setdefault(block, {})[branch] = folded
        else:
            params[block] = folded
    return params


def in_torch_names(weights: Tensors) -> Tensors:
    """jax-fid's weights in pytorch-fid's names and layout: kernels (…, in, out) as (out, in, …)."""
    entries = {}
    for name in weights:
        *path, layer, leaf = name.split("/")
        theirs = _LEAVES.get(f"{layer}/{leaf}")
        if theirs is None:
            continue

        def read(name: str = name) -> np.ndarray:
            array = weights[name].astype(np.float32)
            return array.transpose(-1, -2, *range(array.ndim - 2)) if array.ndim > 1 else array

        shape = weights.shape(name)
        shape = (*shape[:-3:-1], *shape[:-2]) if len(shape) > 1 else shape
        place, kind = weights.place(name), np.dtype(np.float32)
        entries[".".join([*path, theirs])] = Entry(place, shape, kind, read)
    return Tensors(entries, {"format": _JAX_FID})


def features_alone(weights: Tensors) -> bool:
    """Whether they are jax-fid's without a classifier, which that code does not use."""
    return weights.metadata.get("format") == _JAX_FID and "fc.weight" not in weights
