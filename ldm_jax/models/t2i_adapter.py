"""T2I-Adapter: a small network that turns a hint into features of a UNet (Mou et al. 2023, §3.3).

One map is added at the end of each level of the UNet's way down, `UNet.__call__`'s `features`. The
network does not see the time, so one evaluation serves all steps of a picture.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.layers import check_channels, check_sides, conv, level_widths
from ldm_jax.models.unet import UNet


class T2IAdapter(nn.Module):
    """Hints (B, H, W, hint_in) in [0, 1] → a map (B, H/s, W/s, channels[i]) of each block i.

    Squares of `factor` pixels become channels first. The blocks `halved` begin with the mean of
    2×2, so s is `factor` times 2 for each of them up to i. A block has `num_res_blocks` residual
    blocks, of its width or, if `light`, of a quarter of it.

    The first convolution, whose kernel sees the hint, starts at zero, and so do all biases: each
    map is zero then, and every kernel still learns after the first step. The originals start at
    random numbers.

    Raises ValueError for another number of channels, and sides that are no multiples of `factor`.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    halved: tuple[int, ...] = (1, 2, 3)
    hint_in: int = 3
    factor: int = 8
    num_res_blocks: int = 2
    light: bool = False
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @property
    def smallest(self) -> tuple[int, int, int, int]:
        """The shape of the smallest hint."""
        return 1, self.factor, self.factor, self.hint_in

    @nn.compact
    def __call__(self, hint: jax.Array, **_) -> tuple[jax.Array, ...]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        check_channels(hint, "T2IAdapter with hint_in", self.hint_in)
        check_sides(hint, "a T2I-Adapter's hint", self.factor)
        h, features = pixel_unshuffle(hint, self.factor), []
        if not self.light:
            h = conv(self.channels[0], zero_init=True, name="conv_in", **types)(h)
        for i, channels in enumerate(self.channels):
            width, name = (channels // 4 if self.light else channels), f"body_{i}"
            if i in self.halved:
                h = mean_of_four(h)
            if self.light or h.shape[-1] != width:
                zero = self.light and i == 0
                h = conv(width, 1, zero_init=zero, name=f"{name}_in_conv", **types)(h)
            for j in range(self.num_res_blocks):
                block = f"{name}_resnets_{j}"
                more = nn.relu(conv(width, name=f"{block}_block1", **types)(h))
                h = h + conv(width, 3 if self.light else 1, name=f"{block}_block2", **types)(more)
            if self.light:
                h = conv(channels, 1, name=f"{name}_out_conv", **types)(h)
            features.append(h)
        return tuple(features)


def pixel_unshuffle(x: jax.Array, factor: int) -> jax.Array:
    """(B, f·h, f·w, C) → (B, h, w, C·f²): channel (c·f + y)·f + x is pixel (y, x) of a square."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // factor, factor, width // factor, factor, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(*x.shape[:2], x.shape[3], -1)


def mean_of_four(x: jax.Array) -> jax.Array:
    """Mean of 2×2 pixels; an odd side is rounded up, and the last mean is of what is there."""
    return nn.avg_pool(x, (2, 2), (2, 2), "SAME", count_include_pad=False)


def feature_places(unet: UNet) -> list[tuple[int, int]]:
    """(channels, size of the latents over that of the map) of each of a UNet's `features`.

    They are those of its levels and of its middle. A level without attention takes its map after
    downsampling: so do the originals, in SDXL's first level.
    """
    widths = level_widths(unet.model_channels, unet.channel_mult)
    last, places = len(widths) - 1, []
    for level, width in enumerate(widths):
        inside = 2**level in unet.attention_resolutions or level == last
        places.append((width, 2**level if inside else 2 ** (level + 1)))
    return [*places, (widths[-1], 2**last)]


def halvings(sizes: Sequence[int]) -> tuple[int, ...]:
    """`T2IAdapter.halved` of maps whose sides are divided by these numbers."""
    return tuple(
        i for i, pair in enumerate(zip(sizes, sizes[1:], strict=False), 1) if pair[0] < pair[1]
    )
