"""FID's Inception-v3 from a file, `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid."""

from typing import Any

import numpy as np

from ldm_jax.interop.files import Tensors
from ldm_jax.models.inception import CLASSES, WIDTH

KEY = "Mixed_7c.branch3x3dbl_3b.conv.weight"
_EPSILON = 1e-3


def read_inception(weights: Tensors) -> dict[str, Any]:
    """Parameters of `InceptionV3`: W' = W γ / √(var + ε), b' = β − mean γ / √(var + ε).

    Raises:
      ValueError: the network has other classes, as torchvision's own has, or a tensor is missing.
    """
    if "fc.weight" not in weights:
        raise ValueError(f"{weights.place(KEY).rpartition(':')[0]} lacks fc.weight, the classifier")
    if weights.shape("fc.weight") != (CLASSES, WIDTH):
        raise ValueError(
            f"{weights.place('fc.weight')} has shape {weights.shape('fc.weight')}: this is not the "
            f"Inception-v3 of FID, which has {CLASSES} classes (pt_inception-2015-12-05-6726825d"
            ".pth); torchvision's own makes other features"
        )
    params: dict[str, Any] = {"fc": {"kernel": weights["fc.weight"].T}}
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
