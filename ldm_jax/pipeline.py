"""What a user holds: `load(path)`, then prompts in, pictures out."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning import Conditioning, embed
from ldm_jax.interop.native import open_model, save_model
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.models.unet import UNet

log = logging.getLogger(__name__)


def load(path: str | Path = "", dtype: str = "float32") -> "Pipeline":
    """A model from a finished run's workdir or an exported file; "" is the one that ships.

    `dtype` "bfloat16" halves the memory of the parameters and computes in it.

    Raises:
      FileNotFoundError: nothing there. ValueError: it is no text-to-image model of ours.
    """
    config, params = open_model(path)
    if config["task"] != "diffusion":
        raise ValueError(
            f"{path} holds an {config['task']} alone; name it as config.first_stage to train a "
            "diffusion model on it, or measure it with evaluate.py"
        )
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: choose float32 or bfloat16")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)
    return Pipeline(LatentDiffusion.from_config(config, dtype), jax.device_put(params), config)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A text-to-image model ready to draw. Made by `load`."""

    model: LatentDiffusion
    params: dict[str, Any]
    config: dict[str, Any]

    @property
    def unet(self) -> UNet:
        return self.model.unet

    @property
    def autoencoder(self) -> AutoencoderKL:
        return self.model.autoencoder

    @property
    def schedule(self):
        return self.model.schedule

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str = "",
        *,
        n: int = 1,
        steps: int = 50,
        sampler: str = "ddim",
        guidance: float | None = None,
        eta: float = 0.0,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        latents: np.ndarray | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Draws `n` pictures of each prompt.

        Picture i (prompt by prompt) of a seed is the same whatever else is drawn with it. Only the
        shapes, `steps` and `sampler` (and whether `guidance` is 1, which halves the work) compile.

        Args:
          prompt: one or several; what goes past the model's text length is cut, with a warning.
          negative_prompt: what guidance leads away from; "" is the unconditional model.
          guidance: uncond + guidance·(cond − uncond); None takes the model's own default.
          eta: 0 is deterministic DDIM, 1 ancestral sampling.
          height, width: in pixels, multiples of the autoencoder's factor; default: as trained.
          latents: unit Gaussian starting noise (B, h, w, c) in place of the seed's.
          progress: called with the number of finished steps, from inside the running program.

        Returns:
          float32 (B, H, W, 3) in [0, 1], B = n · number of prompts.

        Raises:
          ValueError: an argument is out of its range; says what is allowed.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or n < 1:
            raise ValueError(
                f"{len(prompts)} prompts, n={n}: at least one picture must be asked for"
            )
        prompts = [p for p in prompts for _ in range(n)]
        guidance = self.config["sampling"]["guidance"] if guidance is None else guidance
        self._check_guidance(guidance)
        coefficients = self.model.coefficients(sampler, steps)
        shape = self._latent_shape(height, width)
        if latents is not None and latents.shape != (len(prompts), *shape):
            raise ValueError(f"latents {latents.shape}: expected {(len(prompts), *shape)}")
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(seed), jnp.arange(len(prompts))
        )
        images = self._generate(
            self.params,
            self._inputs(prompts),
            self._inputs([negative_prompt] * len(prompts)),
            keys,
            coefficients,
            jnp.float32(guidance),
            jnp.float32(eta),
            latents=latents,
            latent_shape=shape,
            sampler=sampler,
            guided=guidance != 1.0,
            progress=progress,
        )
        return np.asarray(images, np.float32)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Pictures (B, H, W, 3), uint8 or float [0, 1] → scaled latents (B, h, w, c)."""
        images = np.asarray(images)
        scale = 255.0 if images.dtype == np.uint8 else 1.0
        return np.asarray(self._encode(self.params, images / scale * 2.0 - 1.0))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Scaled latents (B, h, w, c) → pictures (B, H, W, 3), float32 [0, 1]."""
        return np.clip((np.asarray(self._decode(self.params, latents)) + 1.0) / 2.0, 0.0, 1.0)

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """What the UNet is told of each prompt."""
        return embed(self.model.embedders, self.params, self._inputs(list(prompts)))

    def save(self, path: str | Path, dtype: str = "float32") -> None:
        """Writes one self-describing .safetensors that `load` opens."""
        save_model(path, self.config, self.params, dtype)

    def _inputs(self, prompts: list[str]) -> dict[str, np.ndarray]:
        for embedder in self.model.embedders:
            for prompt in dict.fromkeys(prompts):
                lost = embedder.tokenizer.overflow(prompt)
                if lost:
                    length = embedder.tokenizer.max_length
                    log.warning("a prompt is longer than %d tokens; cut: %r", length, lost)
        return {e.name: e.prepare({"caption": prompts}) for e in self.model.embedders}

    def _check_guidance(self, guidance: float) -> None:
        undropped = [e.name for e in self.model.embedders if not e.dropout]
        if guidance != 1.0 and undropped:
            raise ValueError(
                f"guidance={guidance:g}, but this model was trained without dropping its condition "
                f"(conditioning.{undropped[0]}.dropout is 0), so it knows no unconditional "
                "prediction to lead away from; use guidance=1"
            )

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        factor, size = self.autoencoder.downsampling, self.config["image_size"]
        # The UNet halves the latents between its levels, and must come back to the same size.
        multiple = factor * 2 ** (len(self.unet.channel_mult) - 1)
        sides = (height or size, width or size)
        for name, side in zip(("height", "width"), sides, strict=True):
            if side % multiple or side < multiple:
                raise ValueError(f"{name}={side}: this model draws multiples of {multiple} pixels")
        return sides[0] // factor, sides[1] // factor, self.model.latent_channels

    @functools.cached_property
    def _generate(self):
        static = ("latent_shape", "sampler", "guided", "progress")
        return jax.jit(self.model.generate, static_argnames=static)

    @functools.cached_property
    def _encode(self):
        return jax.jit(
            lambda p, x: self.autoencoder.apply({"params": p["autoencoder"]}, x, method="encode")
        )

    @functools.cached_property
    def _decode(self):
        return jax.jit(
            lambda p, z: self.autoencoder.apply({"params": p["autoencoder"]}, z, method="decode")
        )
