"""The moments of pictures' latents: encoded once and kept in memory, or encoded in each step."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.data.loader import batches_once
from ldm_jax.diffusion.noise import Examples, per_example
from ldm_jax.models.build import Autoencoder
from ldm_jax.pictures import to_signed
from ldm_jax.runtime.mesh import spread, to_host

log = logging.getLogger(__name__)
LATENTS = ("memory", "step")
IN_MEMORY = 2_000_000  # pictures


def moments(autoencoder: Autoencoder, params: Any, images: jax.Array) -> jax.Array:
    """Posterior mean and log-variance (B, h, w, 2c), float32, of uint8 (B, H, W, 3).

    An autoencoder with one channel encodes the mean of the colours.
    """
    x = to_signed(images)
    if autoencoder.in_channels == 1:
        x = jnp.mean(x, axis=-1, keepdims=True)
    return jnp.concatenate(autoencoder.apply({"params": params}, x, method="moments"), axis=-1)


def sample_latents(
    autoencoder: Autoencoder,
    moments: jax.Array,
    key: jax.Array,
    examples: Examples | None = None,
) -> jax.Array:
    """Scaled latents (B, h, w, c) drawn from the posterior, each example's by its own key."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    noise = per_example(jax.random.normal, key, mean.shape, examples)
    return (mean + jnp.exp(0.5 * logvar) * noise) * autoencoder.scale_factor


class LatentSource(Sequence):
    """A source whose examples also have `moments`, (h, w, 2c) float32, which are computed once.

    The first access to `moments` computes them; access them before several threads read. With
    `pixels` the pictures are read as well, for conditions that are made from them; without, no
    picture is decoded, and captions can still be augmented.
    """

    def __init__(self, source: Any, autoencoder: Autoencoder, params: Any, pixels: bool):
        self._autoencoder, self._params = autoencoder, params
        self.classes = source.classes
        self.left_out, self.lost_captions = source.left_out, source.lost_captions
        self.pictures, self._pixels = source, pixels

    @functools.cached_property
    def moments(self) -> np.ndarray:
        """The moments of all pictures, (N, h, w, 2c); the first access encodes them."""
        if len(self):
            log.info("Encoding %d pictures once", len(self))
        encode = jax.jit(lambda params, images: moments(self._autoencoder, params, images))
        encoded = [
            to_host(encode(self._params, spread(batch["image"])))[batch["valid"]]
            for batch in batches_once(self.pictures, 32, entries=("image",))
        ]
        return np.concatenate(encoded) if encoded else np.zeros(0, np.float32)

    def __len__(self) -> int:
        return len(self.pictures)

    def describe(self, index: int) -> dict[str, Any]:
        """As the source's."""
        return self.pictures.describe(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rest = self.pictures[index] if self._pixels else self.pictures.describe(index)
        return rest | {"moments": self.moments[index]}
