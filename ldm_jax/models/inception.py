"""Inception-v3 as the Fréchet Inception distance uses it.

The network is that of Szegedy et al. 2016 (arXiv 1512.00567, §6) with the weights of TensorFlow's
graph of 2015-12-05: 1008 classes; the averages inside the blocks count only pixels of the picture;
and the last block takes a maximum where the others take an average (Heusel et al. 2017, as
`pytorch-fid` and `torch-fidelity` build it). Batch norms are folded into the convolutions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.layers import Conv, Dense

CLASSES = 1008
WIDTH = 2048
# A convolution: its name, output channels, kernel (height, width), stride, padding (height, width).
Convolution = tuple[str, int, tuple[int, int], int, tuple[int, int]]


def _conv(name: str, features: int, kernel: int | tuple[int, int] = 1, stride: int = 1, pad=True):
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = tuple(side // 2 for side in sides) if pad else (0, 0)
    return name, features, sides, stride, padding


STEM: tuple[Convolution | None, ...] = (  # None: a maximum over 3×3 with stride 2
    _conv("Conv2d_1a_3x3", 32, 3, 2, pad=False),
    _conv("Conv2d_2a_3x3", 32, 3, pad=False),
    _conv("Conv2d_2b_3x3", 64, 3),
    None,
    _conv("Conv2d_3b_1x1", 80),
    _conv("Conv2d_4a_3x3", 192, 3, pad=False),
    None,
)


class Block(NamedTuple):
    """Branches side by side, each a chain of convolutions, and one that pools.

    The members of a list in a branch stand side by side on the output of what is before them. The
    pooled branch is convolved if `pooled` has channels, and has the stride of the others.
    """

    branches: tuple[tuple[Convolution | list[Convolution], ...], ...]
    pool: str
    pooled: int = 0


def _a(pooled: int) -> Block:
    return Block(
        (
            (_conv("branch1x1", 64),),
            (_conv("branch5x5_1", 48), _conv("branch5x5_2", 64, 5)),
            (
                _conv("branch3x3dbl_1", 64),
                _conv("branch3x3dbl_2", 96, 3),
                _conv("branch3x3dbl_3", 96, 3),
            ),
        ),
        "mean",
        pooled,
    )


_B = Block(
    (
        (_conv("branch3x3", 384, 3, 2, pad=False),),
        (
            _conv("branch3x3dbl_1", 64),
            _conv("branch3x3dbl_2", 96, 3),
            _conv("branch3x3dbl_3", 96, 3, 2, pad=False),
        ),
    ),
    "shrink",
)


def _c(inner: int) -> Block:
    return Block(
        (
            (_conv("branch1x1", 192),),
            (
                _conv("branch7x7_1", inner),
                _conv("branch7x7_2", inner, (1, 7)),
                _conv("branch7x7_3", 192, (7, 1)),
            ),
            (
                _conv("branch7x7dbl_1", inner),
                _conv("branch7x7dbl_2", inner, (7, 1)),
                _conv("branch7x7dbl_3", inner, (1, 7)),
                _conv("branch7x7dbl_4", inner, (7, 1)),
                _conv("branch7x7dbl_5", 192, (1, 7)),
            ),
        ),
        "mean",
        192,
    )


_D = Block(
    (
        (_conv("branch3x3_1", 192), _conv("branch3x3_2", 320, 3, 2, pad=False)),
        (
            _conv("branch7x7x3_1", 192),
            _conv("branch7x7x3_2", 192, (1, 7)),
            _conv("branch7x7x3_3", 192, (7, 1)),
            _conv("branch7x7x3_4", 192, 3, 2, pad=False),
        ),
    ),
    "shrink",
)


def _e(pool: str) -> Block:
    def split(name):
        return [_conv(f"{name}a", 384, (1, 3)), _conv(f"{name}b", 384, (3, 1))]

    return Block(
        (
            (_conv("branch1x1", 320),),
            (_conv("branch3x3_1", 384), split("branch3x3_2")),
            (
                _conv("branch3x3dbl_1", 448),
                _conv("branch3x3dbl_2", 384, 3),
                split("branch3x3dbl_3"),
            ),
        ),
        pool,
        192,
    )


BLOCKS = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _B,
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _D,
    "Mixed_7b": _e("mean"),
    "Mixed_7c": _e("maximum"),
}


class MixedBlock(nn.Module):
    """The block of `BLOCKS` of this name, (B, H, W, C) → its branches' channels side by side."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block, found = BLOCKS[self.name], []
        for branch in block.branches:
            h = x
            for layer in branch:
                several = layer if isinstance(layer, list) else [layer]
                h = jnp.concatenate([_convolved(h, one) for one in several], axis=-1)
            found.append(h)
        pooled = POOLS[block.pool](x)
        if block.pooled:
            pooled = _convolved(pooled, _conv("branch_pool", block.pooled))
        return jnp.concatenate([*found, pooled], axis=-1)


class InceptionV3(nn.Module):
    """Images (B, H, W, 3) in [−1, 1], 299×299 in all published numbers → the features of the last
    pooling (B, 2048), and the logits of 1008 classes without a bias, of which the Inception score
    is made. Sides of 75 pixels or more."""

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = images
        for layer in STEM:
            x = _shrunk(x) if layer is None else _convolved(x, layer)
        for name in BLOCKS:
            x = MixedBlock(name=name)(x)
        features = x.mean(axis=(1, 2))
        return features, Dense(CLASSES, use_bias=False, name="fc")(features)


def _convolved(x: jax.Array, layer: Convolution) -> jax.Array:
    name, features, kernel, stride, (high, wide) = layer
    padding = ((high, high), (wide, wide))
    return nn.relu(Conv(features, kernel, stride, padding, name=name)(x))


def _mean(x: jax.Array) -> jax.Array:
    """Over the pixels of 3×3 that are in the picture."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _maximum(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def _shrunk(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


POOLS = {"mean": _mean, "maximum": _maximum, "shrink": _shrunk}
