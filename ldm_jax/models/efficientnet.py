"""EfficientNet-Lite0, a network for features of pictures.

The network is EfficientNet (Tan & Le 2019, arXiv 1905.11946, table 1) without squeeze-and-excite
and with ReLU6 (github.com/tensorflow/tpu, efficientnet/lite); its convolutions pad as TensorFlow's
"SAME".
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.layers import Conv, Layer

# Repeats, kernel size, stride of the first, expansion, output channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Depthwise(Layer):
    """A depthwise convolution, padded as "SAME".

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
    """Expand, convolve each channel, project; plus the input if the shapes agree."""

    features: int
    kernel: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h, hidden = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            h = nn.relu6(Conv(hidden, (1, 1), name="expand")(h))
        h = Depthwise(self.kernel, self.stride, name="depthwise")(h)
        h = Conv(self.features, (1, 1), name="project")(nn.relu6(h))
        return x + h if h.shape == x.shape else h


class EfficientNetLite0(nn.Module):
    """Pooled features (B, 1280) of images (B, H, W, 3) in [-1, 1]; batch norms folded in."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu6(Conv(32, (3, 3), 2, name="stem")(images))
        block = 0
        for repeats, kernel, stride, expansion, features in STAGES:
            for i in range(repeats):
                step = stride if i == 0 else 1
                name = f"blocks_{block}"
                x = InvertedResidual(features, kernel, step, expansion, name=name)(x)
                block += 1
        return nn.relu6(Conv(1280, (1, 1), name="head")(x)).mean(axis=(1, 2))


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's: ceil(size / stride) outputs, the odd pixel of padding at the end."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2
