"""ControlNet: a trained copy of a UNet's way down that follows a hint (Zhang et al. 2023, §3.2).

Its outputs, through convolutions that start at zero, are added to the UNet's skips and middle. The
hint is a picture, such as edges or a segmentation in colours, of the size of what is drawn.
Modules have the names of the UNet (`unet.py`), and otherwise the originals'.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.layers import check_channels, conv, level_widths
from ldm_jax.models.unet import UNet, encode, time_and_vector

# Of the hint's embedding, from the picture's size to that of the latents, which each step halves.
CHANNELS = (16, 32, 96, 256)


class HintEmbedding(nn.Module):
    """Hints (B, H, W, C) in [0, 1] → (B, H/f, W/f, features), f = 2^(len(channels) − 1).

    The last convolution starts at zero.
    """

    features: int
    channels: tuple[int, ...] = CHANNELS
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, hint: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        # The originals count activations as well, so that convolutions have even numbers.
        steps = [(self.channels[0], 1)]
        for width, following in zip(self.channels, self.channels[1:], strict=False):
            steps += [(width, 1), (following, 2)]
        h = hint
        for i, (width, stride) in enumerate(steps):
            h = nn.silu(conv(width, stride=stride, name=f"block_{2 * i}", **types)(h))
        name = f"block_{2 * len(steps)}"
        return conv(self.features, zero_init=True, name=name, **types)(h)


class ControlNet(nn.Module):
    """Latents (B, h, w, C), timesteps (B,) and a hint → residuals for `UNet.__call__`.

    `unet` has the fields of the UNet that it is for; its way up and `out_channels` are not used.
    Give the `hint`, pictures (B, H, W, hint_in) in [0, 1], or `embedded`, what its embedding makes
    of them (B, h, w, model_channels), which is the same at every timestep.

    `bgr`: whether the published weights expect hints' channels in the order blue, green, red.

    With `branch`, the number of a skip, the residuals end with that skip's.

    Raises ValueError for hints of another size or number of channels, and as the UNet.
    """

    unet: UNet
    hint_in: int = 3
    hint_channels: tuple[int, ...] = CHANNELS
    bgr: bool = False

    @property
    def factor(self) -> int:
        """The size of hints over that of latents."""
        return 2 ** (len(self.hint_channels) - 1)

    @property
    def embedding(self) -> HintEmbedding:
        """The hint's embedding; its parameters are this network's `input_hint_block`."""
        return HintEmbedding(**self._embedding())

    def _embedding(self) -> dict:
        width = level_widths(self.unet.model_channels, self.unet.channel_mult)[0]
        types = dict(dtype=self.unet.dtype, param_dtype=self.unet.param_dtype)
        return dict(features=width, channels=self.hint_channels) | types

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        context: jax.Array | None = None,
        deterministic: bool = True,
        *,
        y: jax.Array | None = None,
        hint: jax.Array | None = None,
        embedded: jax.Array | None = None,
        branch: int | None = None,
    ) -> tuple[jax.Array, ...]:
        unet = self.unet
        types = dict(dtype=unet.dtype, param_dtype=unet.param_dtype)
        unet._check(x, context, y, None)
        if embedded is None:
            check_channels(hint, "ControlNet with hint_in", self.hint_in)
            embedded = HintEmbedding(**self._embedding(), name="input_hint_block")(hint)
        if embedded.shape[1:3] != x.shape[1:3]:
            given, wanted = (
                " × ".join(str(self.factor * side) for side in a.shape[1:3]) for a in (embedded, x)
            )
            raise ValueError(f"a hint of {given} pixels for a picture of {wanted}")
        emb = time_and_vector(unet, x, t, y, None)
        h, skips = encode(unet, x, emb, context, deterministic, embedded, branch=branch)

        def zero(name, h):
            return conv(h.shape[-1], 1, zero_init=True, name=name, **types)(h)

        residuals = [zero(f"zero_convs_{i}_0", skip) for i, skip in enumerate(skips)]
        return (*residuals, *(() if h is None else (zero("middle_block_out_0", h),)))


def initial(params: dict, unet: dict) -> dict:
    """Fresh parameters of a ControlNet with those of the UNet in place of its copy's."""
    return params | {name: leaves for name, leaves in unet.items() if name in params}
