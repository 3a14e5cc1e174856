"""Building blocks that the networks share. Everything is NHWC.

`dtype` is the type of the arithmetic (None: that of the inputs), `param_dtype` that of the
parameters; normalisation statistics are always float32.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

# PyTorch's default for convolutions and linear layers, U(±1/√fan_in), which the originals use.
uniform_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# Of an upsampled row, an even pixel sees the pixels (i − 1, i) of the row below through the taps
# (0; 1, 2), an odd one (i, i + 1) through (0, 1; 2): kind, pixel, tap.
UPSAMPLED_TAPS = np.float32([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
FEWEST_PIXELS = 256  # of a batch, that are worth the sums


class Layer(nn.Module):
    """A module that reads a parameter by the shape that it is declared with.

    Flax traces the initialiser of every parameter in every call to learn that shape, which takes
    most of the time of tracing a network.

    Raises flax.errors.ScopeParamShapeError for a parameter of another shape.
    """

    def param(self, name: str, init_fn: Callable, *init_args: Any, **options: Any) -> Any:
        if not self.has_variable("params", name):
            return super().param(name, init_fn, *init_args, **options)
        value, shape = self.get_variable("params", name), tuple(init_args[0])
        if np.shape(value) != shape:
            path = "/" + "/".join(self.scope.path)
            raise flax.errors.ScopeParamShapeError(name, path, np.shape(value), shape)
        return value


class Dense(Layer, nn.Dense):
    """`nn.Dense`."""


class Conv(Layer, nn.Conv):
    """`nn.Conv`."""


class LayerNorm(Layer, nn.LayerNorm):
    """`nn.LayerNorm`."""


class Embed(Layer, nn.Embed):
    """`nn.Embed`."""


class GroupNorm(Layer):
    """Group normalisation over (B, ..., C) with float32 statistics (Wu & He 2018, eq. 1).

    Two-pass variance: the one-pass form E[x²] − E[x]² loses half the digits of float32. Each pass
    sums over space first, channel by channel, which vectorises; groups are formed of the C sums.
    """

    groups: int = 32
    epsilon: float = 1e-5
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(
                f"GroupNorm: {channels} channels do not divide into {self.groups} groups"
            )
        scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        space = tuple(range(1, x.ndim - 1))

        def group_mean(values):
            sums = jnp.mean(values, axis=space, keepdims=True)
            grouped = sums.reshape(*sums.shape[:-1], self.groups, channels // self.groups)
            return jnp.repeat(jnp.mean(grouped, axis=-1), channels // self.groups, axis=-1)

        def normalise(x, scale, bias):
            h = x.astype(jnp.float32)
            h = h - group_mean(h)
            gain = jax.lax.rsqrt(group_mean(jnp.square(h)) + self.epsilon) * scale
            return (h * gain + bias).astype(self.dtype or x.dtype)

        if x.dtype != jnp.float32:
            # Otherwise the backward pass would keep h, which takes twice the memory of x.
            normalise = jax.checkpoint(normalise)
        return normalise(x, scale, bias)


def conv(
    features: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    padding: int | tuple | None = None,
    zero_init: bool = False,
    kernel_init: Callable = uniform_init,
    upsampled: bool = False,
    **options,
) -> Conv:
    """A square 2-D convolution, zero-padded to keep its size; biases start at zero.

    With `upsampled`, one of kernel 3 is of `upsample(x)` in place of x.
    """
    if upsampled:
        options["conv_general_dilated"] = _conv_of_upsampled
    return Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=kernel // 2 if padding is None else padding,
        kernel_init=nn.initializers.zeros if zero_init else kernel_init,
        **options,
    )


def check_channels(array: jax.Array, field: str, channels: int) -> None:
    """Raises ValueError if an array (..., C) does not have the channels of a network's field."""
    if array.shape[-1] != channels:
        raise ValueError(f"{field}={channels} got {array.shape[-1]} channels, {array.shape}")


def check_sides(array: jax.Array, what: str, factor: int) -> None:
    """Raises ValueError if height and width of (B, H, W, C) are no multiples of a factor."""
    if array.shape[1] % factor or array.shape[2] % factor:
        raise ValueError(f"{what} {array.shape[1:3]}: sides must be multiples of {factor} pixels")


def level_widths(base: int, multiples: tuple[float, ...]) -> tuple[int, ...]:
    """The channels of each level: multiples of those of the first convolution, rounded."""
    return tuple(round(base * multiple) for multiple in multiples)


def width_multiples(widths: Sequence[int]) -> list[float]:
    """The inverse of `level_widths` for widths whose first is the base; integers if possible."""
    base = widths[0]
    return [width / base if width % base else width // base for width in widths]


def upsample(x: jax.Array) -> jax.Array:
    """Nearest neighbour ×2: (B, H, W, C) → (B, 2H, 2W, C), each pixel repeated."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def _conv_of_upsampled(
    x: jax.Array, kernel: jax.Array, window_strides: tuple, padding: list, **options: Any
) -> jax.Array:
    """The convolution of `upsample(x)` with a kernel (3, 3, C, D), padded by 1.

    An output pixel sees 2×2 pixels of x, some of them through several taps. On a CPU, each of the
    four kinds of output pixel is a convolution with 2×2 sums of taps: 4/9 of the products.
    """

    def convolution(x, kernel, padding):
        return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **options)

    def whole(x, kernel):
        return convolution(upsample(x), kernel, padding)

    def in_four(x, kernel):
        taps = UPSAMPLED_TAPS.astype(kernel.dtype)
        sums = jnp.einsum("ayv,bxw,vwcd->abyxcd", taps, taps, kernel)
        pads = (1, 0), (0, 1)
        kinds = [[convolution(x, sums[a, b], (pads[a], pads[b])) for b in (0, 1)] for a in (0, 1)]
        batch, height, width, channels = kinds[0][0].shape
        rows = jnp.stack([jnp.stack(row, axis=3) for row in kinds], axis=2)
        return rows.reshape(batch, 2 * height, 2 * width, channels)

    if math.prod(x.shape[:3]) < FEWEST_PIXELS:
        return whole(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=in_four, default=whole)


def average_pool(x: jax.Array) -> jax.Array:
    """Mean of 2×2 pixels: (B, 2H, 2W, C) → (B, H, W, C)."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def timestep_embedding(t: jax.Array, dim: int) -> jax.Array:
    """Sinusoids of timesteps (B,), 0…1000 and possibly fractional → (B, dim), cosines first."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def with_feature(h: jax.Array, left: Iterator[jax.Array]) -> jax.Array:
    """h and the next of a T2I-Adapter's features, if there is one."""
    feature = next(left, None)
    if feature is None:
        return h
    if feature.shape[1:] != h.shape[1:]:
        given, wanted = (" × ".join(map(str, a.shape[1:])) for a in (feature, h))
        raise ValueError(
            f"a T2I-Adapter's features of {given} where the UNet has {wanted}: its hint must have "
            "the size of the picture"
        )
    return h + feature.astype(h.dtype)
