"""What a user holds: prompts in, pictures out. Made by `ldm_jax.load`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.conditioning import Conditioning, embed
from ldm_jax.diffusion.editing import skipped_steps
from ldm_jax.diffusion.noise import example_keys
from ldm_jax.diffusion.samplers import DDIM_INVERSE
from ldm_jax.embedders import MaskedImageEmbedder
from ldm_jax.first_stage import FirstStage
from ldm_jax.inputs import (
    NEGATIVE_SIZES,
    check_finite,
    check_guidance,
    check_side,
    inputs_for,
    nulls_for,
    parts,
    requests,
    told_sizes,
)
from ldm_jax.interop.lora import Lora, merge, read_lora
from ldm_jax.interop.opening import export
from ldm_jax.latent_diffusion import Edit, LatentDiffusion
from ldm_jax.models.build import Autoencoder
from ldm_jax.models.unet import UNet
from ldm_jax.pictures import as_images, as_mask

# Parameters, and LoRAs to be added to them, each with its scale.
Weights = tuple[dict[str, Any], tuple[tuple[Lora, Any], ...]]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A latent diffusion model ready to draw. Made by `load`.

    `loras` are LoRAs that stand beside the parameters, each with its scale: see `with_lora`.
    """

    model: LatentDiffusion
    params: dict[str, Any]
    config: dict[str, Any]
    loras: tuple[tuple[Lora, float], ...] = ()

    @property
    def unet(self) -> UNet:
        return self.model.unet

    @property
    def autoencoder(self) -> Autoencoder:
        return self.model.autoencoder

    @property
    def schedule(self):
        return self.model.schedule

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels; () if they have but numbers."""
        return tuple(self.config.get("classes", ()))

    @property
    def multiple(self) -> int:
        """Pixels of which the sides of a picture are multiples."""
        # The UNet halves the latents between its levels, and must come back to the same size.
        return self.autoencoder.downsampling * 2 ** (len(self.unet.channel_mult) - 1)

    @functools.cached_property
    def first_stage(self) -> FirstStage:
        """The autoencoder alone."""
        config = {"task": "autoencoder", "autoencoder": self.config["autoencoder"]}
        params = {"autoencoder": self.params["autoencoder"]}
        return FirstStage(self.autoencoder, params, config)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str = "",
        *,
        labels: int | str | Sequence[int | str] | None = None,
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        strength: float | None = None,
        sizes: dict[str, Any] | None = None,
        negative_sizes: dict[str, Any] | None = None,
        conditions: dict[str, np.ndarray] | None = None,
        n: int = 1,
        steps: int = 50,
        sampler: str = "ddim",
        spacing: str | None = None,
        guidance: float | Sequence[float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        threshold: float | None = None,
        compose: Sequence[float] | None = None,
        weak: "Pipeline | None" = None,
        eta: float | None = None,
        churn: float | None = None,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        tile: int | None = None,
        latents: np.ndarray | None = None,
        batch: int | None = None,
        progress: Callable[[int, np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Draws `n` pictures of each prompt, or of each label, or, without condition, `n`.

        Picture i (prompt by prompt) of a seed is the same whatever else is drawn with it. Shapes,
        `steps`, `sampler` and which features are in use compile; numbers never do.

        Args:
          prompt: one or several; what goes past the model's text length is cut, with a warning.
          negative_prompt: what guidance leads away from; "" is the unconditional model.
          labels: of a class-conditional model, one or several, by number or by name.
          image: one to change, (H, W, 3), or one for each picture, uint8 or float in [0, 1]. Its
            size becomes that of the result.
          mask: with `image`, (H, W) or one each, true, 1 or 255 where it is to be drawn anew; the
            rest is returned untouched.
          strength: of the change, 0 (none) … 1; that share of the steps is run. By default 0.8,
            with a mask 1.
          sizes: what SDXL is told: "original_size" and "target_size" (height, width), "crop" (top,
            left), "aesthetic_score"; by default the picture's own size, uncropped, 6.
            `negative_sizes` is what guidance leads away from: the same, but a score of 2.5.
          conditions: arrays of other conditions by their names in `config["conditioning"]`, one
            (1, …) or one for each picture.
          steps: of the whole way from noise to picture.
          sampler, spacing: see `ldm_jax.diffusion.samplers` and `.grids`; the spacing of the
            model by default.
          guidance: uncond + guidance·(cond − uncond), one number or one for each step; None takes
            the model's own.
          guidance_interval: (low, high) share of the noise, 0…1, outside which there is none; a
            step there costs half.
          guidance_rescale: 0…1, against over-exposure by strong guidance (Lin et al. 2023).
          threshold: percentile in (0, 1] of dynamic thresholding (Saharia et al. 2022); None: off.
          compose: a weight for each prompt; all of them make one picture then.
          weak: a worse pipeline of the same latents; guidance leads away from its opinion, in
            place of the unconditional one (autoguidance, Karras et al. 2024).
          eta: of samplers that draw noise, 0: none, 1: as much as DDPM; None: the sampler's own.
          churn: of "euler" and "heun", Karras et al. 2022's S_churn.
          height, width: in pixels, multiples of the autoencoder's factor; default: as trained.
          tile: in pixels; larger pictures are drawn in overlapping tiles of this side. For sizes
            that the model was not trained on.
          latents: unit Gaussian starting noise (B, h, w, c) in place of the seed's.
          batch: pictures that are drawn at a time, which bounds the memory; None: all. The last
            ones are filled up to as many.
          progress: called with the number of finished steps and the latents predicted at the
            last, (B, h, w, c), from inside the running program; with `batch`, for each in turn.

        Returns:
          float32 (B, H, W, 3) in [0, 1], B = n · number of prompts.

        Raises:
          ValueError: an argument is out of its range; says what is allowed.
        """
        embedders = self.model.embedders
        groups = requests(embedders, prompt, labels, n, compose, self.classes)
        count = max((len(values) for values in groups[0].values()), default=n)

        guidance = self.config["sampling"]["guidance"] if guidance is None else guidance
        check_finite(guidance=guidance, guidance_interval=guidance_interval, threshold=threshold)
        check_finite(guidance_rescale=guidance_rescale, compose=compose, eta=eta, churn=churn)
        check_finite(strength=strength, latents=latents)
        check_finite(**(conditions or {}))
        check_guidance(self.model, guidance, None if weak is None else weak.model)
        shape, skip, edit, known = self._starts(
            parts(count, batch), image, mask, strength, steps, height, width
        )
        side = self.autoencoder.downsampling * np.array(shape[:2])
        told = told_sizes(count, side, sizes) | known | (conditions or {})
        inputs = [inputs_for(embedders, group | told, count) for group in groups]
        unlike = (sizes or {}) | NEGATIVE_SIZES | (negative_sizes or {})
        unlike = told_sizes(count, side, unlike)
        nulls = nulls_for(embedders, inputs[0], negative_prompt, unlike, count)
        if latents is not None and latents.shape != (count, *shape):
            raise ValueError(f"latents {latents.shape}: expected {(count, *shape)}")
        run = self.model.plan(
            sampler,
            self.model.levels(steps, spacing),
            guidance,
            interval=guidance_interval,
            weights=compose,
            rescale=guidance_rescale,
            percentile=threshold,
            skip=skip,
            eta=eta,
            churn=churn,
        )
        if skip == 0 and edit.mask is not None:
            # All of it is drawn anew: no trace of what was there.
            alpha, sigma = run.start.alpha, run.start.sigma
            run = run._replace(
                start=run.start._replace(alpha=0.0 * alpha, sigma=np.hypot(alpha, sigma))
            )
        each = (inputs, nulls, example_keys(jax.random.key(seed), count), edit, latents)
        drawn = []
        for rows in parts(count, batch):
            inputs, nulls, keys, edit, latents = jax.tree.map(lambda v, rows=rows: v[rows], each)
            images = _generate(
                self.model,
                self._weights,
                inputs,
                nulls,
                keys,
                run,
                edit,
                latents=latents,
                latent_shape=shape,
                sampler=sampler,
                tile=self._tile(tile, shape),
                weak=None if weak is None else weak._weights,
                weak_model=None if weak is None else weak.model,
                callback=progress,
            )
            drawn.append(np.asarray(images, np.float32))
            if progress is not None:
                jax.effects_barrier()  # its last report comes ahead of the next batch's first
        images = np.concatenate(drawn)[:count]
        if mask is not None:
            image, mask = as_images(image, count), as_mask(mask, np.shape(image)[-3:-1], count)
            images = np.where(mask > 0.0, images, image)
        return images

    def noise(
        self, seed: int, n: int = 1, height: int | None = None, width: int | None = None
    ) -> np.ndarray:
        """What `seed` draws `n` pictures from: `latents`, unit Gaussian, (n, h, w, c)."""
        shape, keys = self._latent_shape(height, width), example_keys(jax.random.key(seed), n)
        return np.asarray(jax.vmap(lambda key: jax.random.normal(key, shape))(keys))

    def invert(
        self,
        images: np.ndarray,
        prompt: str | Sequence[str] | None = None,
        steps: int = 50,
        labels: int | str | Sequence[int | str] | None = None,
    ) -> np.ndarray:
        """Starting noise that draws these pictures again (DDIM inversion, Song et al. 2021, §4.3).

        `pipe(prompt, latents=pipe.invert(images, prompt), guidance=1, steps=steps)` reconstructs
        them, up to what the autoencoder loses; another prompt, or guidance, edits them.
        """
        images = as_images(images)
        count = len(images)
        (group,) = requests(self.model.embedders, prompt, labels, classes=self.classes)
        told = group | told_sizes(count, images.shape[1:3])
        inputs = inputs_for(self.model.embedders, told, count)
        levels = self.model.levels(steps)
        table = DDIM_INVERSE.coefficients(self.schedule, levels)
        latents = _invert(self.model, self._weights, inputs, self.encode(images), table)
        return np.asarray(latents) / np.hypot(levels.alpha[0], levels.sigma[0]).astype(np.float32)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Pictures (B, H, W, C), uint8 or float [0, 1] → scaled latents (B, h, w, c)."""
        return self.first_stage.encode(images)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Scaled latents (B, h, w, c) → pictures (B, H, W, C), float32 [0, 1]."""
        return self.first_stage.decode(latents)

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """What the UNet of a text-to-image model is told of each prompt."""
        size, count = self.config["image_size"], len(prompts)
        told = {"caption": list(prompts)} | told_sizes(count, (size, size))
        inputs = inputs_for(self.model.embedders, told, count)
        return embed(self.model.embedders, _merged(self._weights), inputs)

    def with_lora(self, path: str | Path, scale: float = 1.0) -> "Pipeline":
        """This pipeline with a LoRA of kohya's or peft's format, which stays a delta beside the
        parameters: W + scale·Δ is computed in the program, for any scale the same one.

        Raises:
          ValueError: the file holds none, or one for another model.
        """
        check_finite(scale=scale)
        lora = jax.device_put(read_lora(path, self.config))
        return dataclasses.replace(self, loras=(*self.loras, (lora, scale)))

    def with_scales(self, *scales: float) -> "Pipeline":
        """This pipeline with other scales of its LoRAs, one for each."""
        check_finite(scales=scales)
        if len(scales) != len(self.loras):
            raise ValueError(f"{len(scales)} scales for {len(self.loras)} LoRAs")
        loras = tuple((lora, s) for (lora, _), s in zip(self.loras, scales, strict=True))
        return dataclasses.replace(self, loras=loras)

    def merged(self) -> "Pipeline":
        """This pipeline with its LoRAs added to the parameters for good."""
        return dataclasses.replace(self, params=jax.jit(_merged)(self._weights), loras=())

    def save(self, path: str | Path, dtype: str = "float32", layout: str = "single_file") -> None:
        """Writes the model, LoRAs merged, so that `load` opens it.

        Args:
          layout: "single_file", one self-describing .safetensors; "diffusers", a folder; "compvis",
            one .safetensors with the names of CompVis' and Stability's code.

        Raises:
          ValueError: no such layout, or one that cannot express this model.
        """
        export(path, self.config, self.merged().params, dtype, layout)

    def _starts(self, rows, image, mask, *more):
        """`_start` of the pictures of each part, one part after another, for it encodes."""
        count = 1 + max(int(part[-1]) for part in rows)
        if image is None:
            return self._start(count, None, mask, *more)
        image = as_images(image, count)
        mask = None if mask is None else as_mask(mask, image.shape[1:3], count)
        each = [
            self._start(len(part), image[part], None if mask is None else mask[part], *more)
            for part in rows
        ]
        shape, skip, _, _ = each[0]
        edit, known = jax.tree.map(
            lambda *v: np.concatenate(v)[:count], *(start[2:] for start in each)
        )
        return shape, skip, edit, known

    def _start(self, count, image, mask, strength, steps, height, width):
        """Of a call's arguments: the latents' shape, steps to skip or None, edit or None, and what
        an inpainting model is told."""
        inpainting = [e for e in self.model.embedders if isinstance(e, MaskedImageEmbedder)]
        if inpainting and (image is None or mask is None):
            raise ValueError("this model inpaints: give it an image and a mask")
        if image is None:
            if mask is not None or strength is not None:
                raise ValueError("mask and strength need an image to change")
            return self._latent_shape(height, width), None, None, {}
        image = as_images(image, count)
        size = image.shape[1:3]
        if (height, width) not in ((None, None), size):
            raise ValueError(f"height and width are the image's, {size[0]} and {size[1]}")
        shape = self._latent_shape(*size)
        strength = (0.8 if mask is None else 1.0) if strength is None else strength
        skip = skipped_steps(steps, strength)
        if inpainting:
            known = {"mask": as_mask(mask, size, count), "image": image}
            if strength == 1.0:
                return shape, None, None, known
            return shape, skip, Edit(self.encode(image), None), known
        if mask is not None:
            # A latent is drawn anew if any of its pixels is.
            factor = self.autoencoder.downsampling
            cells = as_mask(mask, size, count).reshape(count, shape[0], factor, shape[1], factor, 1)
            mask = cells.max(axis=(2, 4))
        return shape, skip, Edit(self.encode(image), mask), {}

    def _tile(self, tile: int | None, shape: tuple[int, int, int]) -> int:
        """The side of a tile in latents, 0 where none is asked for or the picture is no larger."""
        if tile is None:
            return 0
        check_side("tile", tile, self.multiple)
        side = tile // self.autoencoder.downsampling
        return side if side < max(shape[:2]) else 0

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        factor, size = self.autoencoder.downsampling, self.config["image_size"]
        height, width = (size if side is None else side for side in (height, width))
        check_side("height", height, self.multiple)
        check_side("width", width, self.multiple)
        return height // factor, width // factor, self.model.latent_channels

    @property
    def _weights(self) -> Weights:
        """Parameters and LoRAs, scales as arrays, so that another scale is no other program."""
        return self.params, tuple((lora, np.float32(scale)) for lora, scale in self.loras)


def _merged(weights: Weights) -> dict[str, Any]:
    params, loras = weights
    for lora, scale in loras:
        params = merge(params, lora, scale)
    return params


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("latent_shape", "sampler", "tile", "weak_model", "callback"),
)
def _generate(model: LatentDiffusion, weights: Weights, *args, weak, weak_model, **kwargs):
    weak = None if weak is None else (weak_model, _merged(weak))
    return model.generate(_merged(weights), *args, weak=weak, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def _invert(model: LatentDiffusion, weights: Weights, *args):
    return model.invert(_merged(weights), *args)
