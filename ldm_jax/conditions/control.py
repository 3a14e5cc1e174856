"""ControlNets and T2I-Adapters as conditions: a hint, such as edges, becomes residuals of the UNet,
or features of its way down."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditions.base import Conditioning, Embedder
from ldm_jax.models.build import tuples
from ldm_jax.models.controlnet import ControlNet, initial
from ldm_jax.models.t2i_adapter import T2IAdapter
from ldm_jax.models.unet import UNet

SCALE = "scale"  # beside the modules of a T2I-Adapter
LUMINANCE = np.float32([0.299, 0.587, 0.114])


# Methods that both embedders share.


def _of_its_name(self) -> tuple[str, ...]:
    """The entry of a batch that has the embedder's name."""
    return (self.name,)


def _black(self, count: int) -> np.ndarray:
    """Black, as small as the network allows."""
    side = self.network.factor
    return np.zeros((count, side, side, self.network.hint_in), np.float32)


def _same(self, raw: np.ndarray, entries: dict[str, Any]) -> np.ndarray:
    """Both sides of guidance get the hint."""
    return raw


def _uncut(self, batch: dict[str, Any]) -> list[str]:
    """There is no text to cut."""
    return []


@dataclasses.dataclass(frozen=True)
class ControlEmbedder:
    """A hint, a picture of the size of what is drawn → residuals of the UNet (Zhang et al. 2023).

    The entry of a batch has its name. Called without parameters it has no effect: so the model
    without it is drawn.
    """

    name: str
    network: ControlNet
    dropout: float
    guided = False
    needs = property(_of_its_name)
    null, negative, cut = _black, _same, _uncut

    def prepare(self, batch: dict[str, Any]) -> np.ndarray:
        """See `hint_of`."""
        hint = hint_of(batch, self.name, self.network.hint_in)
        return np.ascontiguousarray(hint[..., ::-1] if self.network.bgr else hint)

    def __call__(self, params: Any, raw: jax.Array, **_: Any) -> Conditioning:
        if params is None:
            return Conditioning()
        own = {"params": params["input_hint_block"]}
        return Conditioning(control={self.name: self.network.embedding.apply(own, raw)})

    def residuals(
        self, params: Any, x: jax.Array, t: jax.Array, condition: Conditioning, **options: Any
    ) -> tuple[jax.Array, ...]:
        """What `UNet.__call__` takes. `x` are latents (B, h, w, C) with all that is joined to them,
        of which a ControlNet may take the first channels alone."""
        return self.network.apply(
            {"params": params},
            x[..., : self.network.unet.in_channels],
            t,
            condition.context,
            y=condition.vector,
            embedded=condition.control[self.name],
            **options,
        )

    def init(self, key: jax.Array, unet: Any, x: jax.Array, condition: Conditioning) -> Any:
        """Parameters with which it has no effect: of the way down those of the UNet, `unet`."""
        sides = (self.network.factor * side for side in x.shape[1:3])
        hint = jnp.zeros((1, *sides, self.network.hint_in))
        arguments = (x[..., : self.network.unet.in_channels], jnp.zeros(1), condition.context)
        fresh = self.network.init(key, *arguments, y=condition.vector, hint=hint)["params"]
        return initial(fresh, unet)


@dataclasses.dataclass(frozen=True)
class AdapterEmbedder:
    """A hint, as of `ControlEmbedder` → features of the UNet's way down (Mou et al. 2023).

    The parameters may have a `scale`, a number, of the features: in no layer of the network are all
    of them linear. Called without parameters it has no effect.
    """

    name: str
    network: T2IAdapter
    dropout: float
    guided = False
    needs = property(_of_its_name)
    null, negative, cut = _black, _same, _uncut

    def prepare(self, batch: dict[str, Any]) -> np.ndarray:
        """See `hint_of`."""
        return np.ascontiguousarray(hint_of(batch, self.name, self.network.hint_in))

    def __call__(self, params: Any, raw: jax.Array, **_: Any) -> Conditioning:
        if params is None:
            return Conditioning()
        own = {name: leaves for name, leaves in params.items() if name != SCALE}
        features = self.network.apply({"params": own}, raw)
        scale = params.get(SCALE, jnp.ones(()))
        return Conditioning(features=tuple(scale.astype(one.dtype) * one for one in features))


def hint_of(batch: dict[str, Any], name: str, channels: int) -> np.ndarray:
    """float32 (B, H, W, channels) in [0, 1] of batch[name], uint8 or float, of one or several
    pictures; grey ones get equal channels, and of colours one channel gets the luminance (BT.601).

    Raises ValueError for another number of channels, and for numbers out of range.
    """
    hint = np.asarray(batch[name])
    hint = np.float32(hint) / 255.0 if hint.dtype == np.uint8 else np.float32(hint)
    hint = hint[..., None] if hint.ndim == 2 else hint
    hint = hint[None] if hint.ndim == 3 else hint
    allowed = (1, channels, *((3,) if channels == 1 else ()))
    if hint.ndim != 4 or hint.shape[-1] not in allowed:
        raise ValueError(
            f"the hint {name!r} has the shape {np.shape(batch[name])}: expected a "
            f"picture (height, width, {channels}), or several"
        )
    if not (hint.min() >= 0.0 and hint.max() <= 1.0):
        raise ValueError(f"the hint {name!r} has numbers outside of 0 … 1")
    if channels == 1 and hint.shape[-1] == 3:
        hint = np.clip(hint @ LUMINANCE, 0.0, 1.0)[..., None]
    return np.broadcast_to(hint, (*hint.shape[:3], channels))


def control(name: str, section: dict[str, Any], dtype: Any, _: Any) -> ControlEmbedder:
    """The embedder of a section `conditioning.<name>` of kind "control"."""
    fields = tuples(section["network"])
    unet = UNet(**tuples(fields.pop("unet")), dtype=dtype)
    return ControlEmbedder(name, ControlNet(unet=unet, **fields), section["dropout"])


def t2i(name: str, section: dict[str, Any], dtype: Any, _: Any) -> AdapterEmbedder:
    """The embedder of a section `conditioning.<name>` of kind "t2i"."""
    network = T2IAdapter(**tuples(section["network"]), dtype=dtype)
    return AdapterEmbedder(name, network, section["dropout"])


def added_residuals(
    embedders: tuple[Embedder, ...],
    params: dict[str, Any],
    x: jax.Array,
    t: jax.Array,
    condition: Conditioning,
    **options: Any,
) -> tuple[jax.Array, ...] | None:
    """The sum of the residuals of all ControlNets that `condition` has hints for; None for none."""
    several = [
        embedder.residuals(params[embedder.name], x, t, condition, **options)
        for embedder in embedders
        if embedder.name in condition.control
    ]
    if not several:
        return None
    return tuple(sum(parts[1:], start=parts[0]) for parts in zip(*several, strict=True))
