"""An autoencoder alone: pictures to latents and back. `ldm_jax.load` makes it."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.interop.opening import export
from ldm_jax.models.build import Autoencoder
from ldm_jax.pictures import as_images, to_signed, to_unit
from ldm_jax.runtime.mesh import to_host


@dataclasses.dataclass(frozen=True)
class FirstStage:
    """An autoencoder with its parameters; `Pipeline.first_stage` is that of a pipeline."""

    autoencoder: Autoencoder
    params: dict[str, Any]
    config: dict[str, Any]

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Pictures (B, H, W, C), uint8 or float [0, 1] → scaled latents (B, h, w, c)."""
        return to_host(self._encode(self.params, to_signed(as_images(images))))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Scaled latents (B, h, w, c) → pictures (B, H, W, C), float32 [0, 1]."""
        return np.float32(to_host(self._decode(self.params, latents)))

    def save(self, path: str | Path, dtype: str = "float32", layout: str = "single_file") -> None:
        """As `Pipeline.save`."""
        export(path, self.config, self.params, dtype, layout)

    @functools.cached_property
    def _encode(self):
        return jax.jit(
            lambda p, x: self.autoencoder.apply({"params": p["autoencoder"]}, x, method="encode")
        )

    @functools.cached_property
    def _decode(self):
        def decode(params, latents):
            variables = {"params": params["autoencoder"]}
            images = self.autoencoder.apply(variables, latents, method="decode")
            return jnp.clip(to_unit(images), 0.0, 1.0)

        return jax.jit(decode)
