"""IP-Adapters as conditions: a picture becomes keys and values of the UNet's attention."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditions.base import Conditioning
from ldm_jax.models.ip_adapter import IPAdapter, make_ip_adapter
from ldm_jax.pictures import CLIP_MEAN, CLIP_STD, as_images, cropped, to_uint8

SCALE = "scale"  # beside the modules of an IP-Adapter


@dataclasses.dataclass(frozen=True)
class ImagePromptEmbedder:
    """A picture of any size → keys and values beside those of the text (Ye et al. 2023).

    The entry of a batch has the embedder's name. `places` are the paths of the attentions, in the
    order of the network's outputs. The parameters may have a `scale`, a number: attention is linear
    in values, so these are multiplied.
    """

    name: str
    network: IPAdapter
    places: tuple[str, ...]
    dropout: float
    guided = True

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.name,)

    def prepare(self, batch: dict[str, Any]) -> np.ndarray:
        """As CLIP sees the pictures, uint8 or float in [0, 1]: float32 (B, side, side, 3).

        Raises ValueError for another shape, and for numbers out of range.
        """
        try:
            images = as_images(batch[self.name])
            if images.shape[-1] != 3:
                raise ValueError(f"image of shape {images.shape}: expected three colours")
        except ValueError as error:
            raise ValueError(f"conditions[{self.name!r}]: {error}") from None
        small = np.float32(cropped(to_uint8(images), self.network.encoder.side))
        return (small / np.float32(255.0) - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)

    def null(self, count: int) -> np.ndarray:
        """Zeros: no picture."""
        side = self.network.encoder.side
        return np.zeros((count, side, side, 3), np.float32)

    def negative(self, raw: np.ndarray, entries: dict[str, Any]) -> np.ndarray:
        """No picture."""
        return np.zeros_like(raw)

    def cut(self, batch: dict[str, Any]) -> list[str]:
        """There is no text to cut."""
        return []

    def __call__(self, params: Any, raw: jax.Array, **_: Any) -> Conditioning:
        own = {name: leaves for name, leaves in params.items() if name != SCALE}
        pairs = self.network.apply({"params": own}, raw)
        scale = params.get(SCALE, jnp.ones(()))
        made = {
            place: ((key, scale.astype(value.dtype) * value),)
            for place, (key, value) in zip(self.places, pairs, strict=True)
        }
        return Conditioning(images=made)


def ip_adapter(name: str, section: dict[str, Any], dtype: Any, _: Any) -> ImagePromptEmbedder:
    """The embedder of a section `conditioning.<name>` of kind "ip_adapter"."""
    network = make_ip_adapter(section["network"])
    return ImagePromptEmbedder(name, network, tuple(section["places"]), section["dropout"])
