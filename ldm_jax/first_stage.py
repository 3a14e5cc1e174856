"""An autoencoder alone: pictures to latents and back, and the latents that an edit starts from.

`ldm_jax.load` makes it.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditions.base import Embedder
from ldm_jax.diffusion.editing import skipped_steps
from ldm_jax.interop.opening import export
from ldm_jax.latent_diffusion import Known
from ldm_jax.models.build import Autoencoder
from ldm_jax.pictures import as_images, to_signed, to_unit
from ldm_jax.runtime.executables import Kept, kept
from ldm_jax.runtime.mesh import to_host


@dataclasses.dataclass(frozen=True)
class FirstStage:
    """An autoencoder with its parameters; `Pipeline.first_stage` is that of a pipeline."""

    autoencoder: Autoencoder
    params: dict[str, Any]
    config: dict[str, Any]

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Pictures (B, H, W, C), uint8 or float [0, 1] → scaled latents (B, h, w, c)."""
        return to_host(self._run(_encode, to_signed(as_images(images))))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Scaled latents (B, h, w, c) → pictures (B, H, W, C), float32 [0, 1]."""
        return np.float32(to_host(self._run(_decode, latents)))

    def save(self, path: str | Path, dtype: str = "float32", layout: str = "single_file") -> None:
        """As `Pipeline.save`."""
        export(path, self.config, self.params, dtype, layout)

    def _run(self, program: Kept, values: np.ndarray) -> jax.Array:
        return program(self.params["autoencoder"], values, autoencoder=self.autoencoder)


@kept("autoencoder")
def _encode(params: dict, images: jax.Array, *, autoencoder: Autoencoder) -> jax.Array:
    return autoencoder.apply({"params": params}, images, method="encode")


@kept("autoencoder")
def _decode(params: dict, latents: jax.Array, *, autoencoder: Autoencoder) -> jax.Array:
    images = autoencoder.apply({"params": params}, latents, method="decode")
    return jnp.clip(to_unit(images), 0.0, 1.0)


def starting_point(
    first_stage: FirstStage,
    embedders: tuple[Embedder, ...],
    image: np.ndarray | None,
    mask: np.ndarray | None,
    strength: float | None,
    rows: list[np.ndarray],
) -> tuple[float | None, Known | None, dict[str, Any]]:
    """The strength of an edit, or None; the latents to start from; and the entries of a batch made
    from the picture (B, H, W, C), which is encoded in the parts `rows`.

    Raises ValueError if the picture or its mask (B, H, W, 1) is missing, or for the strength.
    """
    entries = {"mask": mask, "image": image}
    needed = {entry for e in embedders for entry in e.needs} & entries.keys()
    if needed and (image is None or mask is None):
        raise ValueError("this model inpaints: give it an image and a mask")
    if image is None:
        if mask is not None or strength is not None:
            raise ValueError("mask and strength need an image to change")
        return None, None, {}
    strength = (0.8 if mask is None else 1.0) if strength is None else strength
    skipped_steps(1, strength)  # for its check, ahead of encoding
    entries = {entry: entries[entry] for entry in needed}
    if needed and strength == 1.0:
        return None, None, entries
    latents = np.concatenate([first_stage.encode(image[part]) for part in rows])[: len(image)]
    if needed or mask is None:
        return strength, Known(latents, None), entries
    # A latent is redrawn if any of its pixels is; only pixels are blended.
    (height, width), factor = latents.shape[1:3], first_stage.autoencoder.downsampling
    cells = mask.reshape(len(mask), height, factor, width, factor, 1)
    return strength, Known(latents, np.float32(cells.max(axis=(2, 4)) > 0.0)), entries
