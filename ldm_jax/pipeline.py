"""The user's interface: prompts in, pictures out. `ldm_jax.load` makes it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.conditions.base import Conditioning, embed
from ldm_jax.conditions.prompts import composed
from ldm_jax.conditions.requests import (
    check_guidance,
    check_side,
    inputs_for,
    negative_entries,
    negatives_for,
    other_entries,
    parts,
    requests,
)
from ldm_jax.conditions.weighted import WeightedPrompts, of_one_length, weighting
from ldm_jax.diffusion.checks import check_finite, check_number, whole
from ldm_jax.diffusion.noise import seed_bits
from ldm_jax.diffusion.plan import Guidance, Sampling, plan
from ldm_jax.diffusion.samplers import DDIM_INVERSE
from ldm_jax.first_stage import FirstStage, starting_point
from ldm_jax.interop.changes import Lora
from ldm_jax.interop.embeddings import add_embeddings
from ldm_jax.interop.hints import add_control
from ldm_jax.interop.ip_adapter import add_ip_adapter
from ldm_jax.interop.lora import read_lora
from ldm_jax.interop.opening import export
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.build import Autoencoder
from ldm_jax.models.unet import UNet
from ldm_jax.pictures import as_images, as_mask
from ldm_jax.programs import Weights, generate, invert, merged, not_finite, starting_noise
from ldm_jax.runtime.mesh import local_mesh, replicated, spread, to_host


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A latent diffusion model that is ready to draw. `load` makes it.

    `loras` are LoRAs that are not merged into the parameters, each with its scale: see `with_lora`.
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
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels; () if they have only numbers."""
        return tuple(self.config.get("classes", ()))

    @property
    def multiple(self) -> int:
        """The sides of a picture are multiples of this number of pixels."""
        # Down- and upsampling restore the size only if every level halves evenly.
        halves = len(self.unet.channel_mult) - 1 if self.unet.resblock_updown else 0
        return self.autoencoder.downsampling * 2**halves

    @functools.cached_property
    def first_stage(self) -> FirstStage:
        """The autoencoder alone."""
        config = {"task": "autoencoder", "autoencoder": self.config["autoencoder"]}
        return FirstStage(self.autoencoder, {"autoencoder": self.params["autoencoder"]}, config)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        labels: int | str | Sequence[int | str] | None = None,
        n: int = 1,
        steps: int | None = None,
        sampler: str | Sampling | None = None,
        guidance: float | Sequence[float] | Guidance | None = None,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        strength: float | None = None,
        conditions: dict[str, Any] | None = None,
        latents: np.ndarray | None = None,
        tile: int | None = None,
        batch: int | None = None,
        progress: Callable[[int, np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Draws `n` pictures of each prompt or each label; without a condition, `n` pictures.

        Picture i (prompt by prompt) of a seed does not depend on what else is drawn with it. New
        shapes, `steps`, samplers and features in use compile a program; new numbers do not.

        Common arguments
          prompt: one or several; text beyond the model's text length is cut, with a warning.
          negative_prompt: the prompt of guidance's negative side, one for all pictures or one for
            each; None: no prompt.
          labels: of a class-conditional model, one or several, by number or by name.
          steps: number of steps from pure noise to the picture; None: the model's own number.
          sampler: a name, or `Sampling` with its spacing and options; None: the model's own.
          guidance: the scale in uncond + guidance·(cond − uncond), one number or one for each step,
            or a `Guidance` with all options; None: the model's own scale.
          height, width: in pixels, multiples of `multiple`; default: the training size.

        Further arguments
          image: a picture to change, (H, W, 3), or one for each picture, uint8 or float in [0, 1].
            The result has its size.
          mask: with `image`, (H, W) or one for each, uint8, bool or float in [0, 1]: 1 where the
            image is redrawn, 0 where it is returned unchanged; values between are blended.
          strength: of the change, 0 (none) … 1: the share of the steps that is run. The default is
            0.8, or 1 with a mask.
          conditions: arrays of other conditions by their entries, one (1, …) for all or one for
            each picture. SDXL's are "original_size" and "target_size" (height, width), "crop" (top,
            left) and "aesthetic_score"; the defaults are the picture's own size, uncropped, 6.
          latents: unit Gaussian starting noise (B, h, w, c) in place of the seed's.
          tile: in pixels; larger pictures are drawn in overlapping tiles of this side. For sizes
            that the model was not trained on.
          batch: number of pictures drawn at a time, which bounds the memory; None: all. The last
            batch is padded to the same number. If it is a multiple of the number of devices of
            this machine, each draws its share.
          progress: called with the number of finished steps and the latents predicted in the last
            one, (B, h, w, c), from inside the running program; with `batch`, once for each batch.

        Returns:
          float32 (B, H, W, 3) in [0, 1], B = n · number of prompts.

        Raises:
          ValueError: an argument is out of its range; the message says what is allowed.
          FloatingPointError: a picture is not finite; the message names the first such step.
        """
        if not isinstance(conditions, dict | None):
            raise ValueError(f"conditions={conditions!r}: give a dict of arrays by entry")
        check_finite(latents=latents)
        check_number(strength=strength)
        check_finite(**conditions or {})
        steps = self.config["sampling"].get("steps", 50) if steps is None else steps
        steps, n, seed, batch = whole(steps=steps, n=n, seed=seed, batch=batch)
        height, width, tile = whole(height=height, width=width, tile=tile)
        latents = None if latents is None else np.asarray(latents, np.float32)
        sampling = Sampling.of(sampler, self.config["sampling"])
        asked = Guidance.of(guidance, self.config["sampling"]["guidance"])
        embedders = self.model.embedders
        groups = requests(embedders, prompt, labels, n, asked.weights, self.classes)
        count = max((len(values) for values in groups[0].values()), default=n)
        shares, syntax = None, self.prompt_syntax
        if syntax != "plain":
            groups, shares = composed(groups, asked.weights is not None)
        if shares is not None:
            asked = dataclasses.replace(asked, weights=(1.0,) * len(groups))
        if asked.weak is None:
            check_guidance(embedders, asked.scale, asked.method)
        else:
            self.model.check_weak(asked.weak.model)
        asked.check_alone(self.unet.time_cond_proj_dim is not None, bool(negative_prompt))
        rows = parts(count, batch)
        if image is not None:
            image = as_images(image, count)
            if (height, width) not in ((None, None), image.shape[1:3]):
                size = " and ".join(map(str, image.shape[1:3]))
                raise ValueError(f"height and width are the image's, {size}")
            height, width = image.shape[1:3]
            mask = None if mask is None else as_mask(mask, (height, width), count)
        shape = self._latent_shape(height, width)
        strength, known, pictures = starting_point(
            self.first_stage, embedders, image, mask, strength, rows
        )
        side = self.autoencoder.downsampling * np.array(shape[:2])
        others = other_entries(embedders, conditions, count, side) | pictures
        inputs = [inputs_for(embedders, group | others, count) for group in groups]
        negatives = negative_entries(
            embedders, negative_prompt, conditions, asked.negative, count, side
        )
        negatives = negatives_for(embedders, inputs[0], negatives)
        *inputs, negatives = of_one_length(embedders, [*inputs, negatives])
        if latents is not None and latents.shape != (count, *shape):
            raise ValueError(f"latents {latents.shape}: expected {(count, *shape)}")

        masked = known is not None and known.mask is not None
        run = plan(self.model.diffusion, steps, sampling, asked, strength=strength, masked=masked)
        bits, index = seed_bits(seed), np.arange(count, dtype=np.int32)
        each = (inputs, negatives, index, known, latents, shares)
        weak = None if asked.weak is None else asked.weak.with_prompt_syntax(syntax)
        draw = functools.partial(
            generate,
            model=self.model,
            run=run,
            latent_shape=shape,
            sampler=sampling.sampler,
            branch=sampling.cache_branch,
            tile=self._tile(tile, shape),
            weak=None if weak is None else weak._weights,
            weak_model=None if weak is None else weak.model,
        )
        drawn = []
        for part in rows:
            arguments = jax.tree.map(lambda v, part=part: v[part], each)
            mesh = local_mesh(len(part))
            if mesh is None:
                images = draw(self._weights, bits, *arguments, callback=progress)
            else:
                everywhere = self._on_all_devices
                with jax.set_mesh(mesh):
                    images = draw(everywhere, bits, *spread(arguments), callback=progress)
            images = np.float32(to_host(images))
            if progress is not None:
                jax.effects_barrier()  # its last report comes before the next batch's first
            if not np.isfinite(images).all():
                raise FloatingPointError(
                    not_finite(functools.partial(draw, self._weights, bits, *arguments), steps)
                )
            drawn.append(images)
        images = np.concatenate(drawn)[:count]
        return images if mask is None else mask * images + (1.0 - mask) * image

    def noise(
        self, seed: int, n: int = 1, height: int | None = None, width: int | None = None
    ) -> np.ndarray:
        """The starting noise of `n` pictures of `seed`: unit Gaussian `latents` (n, h, w, c)."""
        shape, index = self._latent_shape(height, width), np.arange(n, dtype=np.int32)
        return np.asarray(starting_noise(seed_bits(seed), index, latent_shape=shape))

    def invert(
        self,
        images: np.ndarray,
        prompt: str | Sequence[str] | None = None,
        steps: int = 50,
        labels: int | str | Sequence[int | str] | None = None,
    ) -> np.ndarray:
        """The starting noise of given pictures (DDIM inversion, Song et al. 2021, §4.3).

        `pipe(prompt, latents=pipe.invert(images, prompt), guidance=1, steps=steps)` reconstructs
        them, up to the autoencoder's error; another prompt, or guidance, edits them.
        """
        (steps,) = whole(steps=steps)
        images = as_images(images)
        count = len(images)
        embedders, diffusion = self.model.embedders, self.model.diffusion
        (group,) = requests(embedders, prompt, labels, classes=self.classes)
        entries = group | other_entries(embedders, None, count, images.shape[1:3])
        inputs = inputs_for(embedders, entries, count)
        grid = diffusion.grid(steps, "ddim")
        table = DDIM_INVERSE.coefficients(diffusion.schedule, grid)
        latents = invert(self._weights, inputs, self.encode(images), table, model=self.model)
        spread = np.hypot(grid.here.alpha[0], grid.here.sigma[0])
        return np.asarray(latents) / spread.astype(np.float32)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Pictures (B, H, W, C), uint8 or float [0, 1] → scaled latents (B, h, w, c)."""
        return self.first_stage.encode(images)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Scaled latents (B, h, w, c) → pictures (B, H, W, C), float32 [0, 1]."""
        return self.first_stage.decode(latents)

    def embed(self, prompts: str | Sequence[str]) -> Conditioning:
        """The UNet's context for each prompt of a text-to-image model."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        size, count = self.config["image_size"], len(prompts)
        embedders = self.model.embedders
        entries = {"caption": list(prompts)}
        entries |= other_entries(embedders, None, count, (size, size))
        (inputs,) = of_one_length(embedders, [inputs_for(embedders, entries, count)])
        return embed(embedders, merged(self._weights), inputs)

    @property
    def prompt_syntax(self) -> str:
        """How prompts are read, one of `weighted.SYNTAXES`."""
        weighted = any(isinstance(e, WeightedPrompts) for e in self.model.embedders)
        return "a1111" if weighted else "plain"

    def with_prompt_syntax(self, syntax: str) -> "Pipeline":
        """This pipeline, whose prompts are "plain" texts or of "a1111": see `conditions.prompts`.

        Raises ValueError for an unknown syntax, or a model without prompts.
        """
        model = dataclasses.replace(self.model, embedders=weighting(self.model.embedders, syntax))
        return dataclasses.replace(self, model=model)

    def with_lora(self, path: str | Path, scale: float = 1.0) -> "Pipeline":
        """This pipeline with a LoRA of kohya's or peft's format, which is kept separately.

        W + scale·Δ is computed in the compiled program, so another scale compiles nothing.

        Raises:
          ValueError: the file holds no LoRA, or one for another model.
        """
        check_finite(scale=scale)
        lora = jax.device_put(read_lora(path, self.config))
        return dataclasses.replace(self, loras=(*self.loras, (lora, scale)))

    def with_embedding(self, path: str | Path, token: str = "") -> "Pipeline":
        """This pipeline with the tokens of a textual inversion, for prompts with their names.

        Args:
          path: a file of diffusers' or AUTOMATIC1111's format, or a workdir.
          token: a name in place of the file's own.

        Raises:
          ValueError: the file holds none, one for another model, or a token that exists already.
        """
        return self._changed(*add_embeddings(path, self.config, self.params, token))

    def with_control(self, path: str | Path, scale: float = 1.0, name: str = "") -> "Pipeline":
        """This pipeline with a ControlNet or a T2I-Adapter, which needs a hint:
        `conditions={"control": hint}`.

        A hint is a picture of the size of what is drawn, (H, W, 3) or one for each, uint8 or float
        in [0, 1]. Several add up. With a T2I-Adapter a picture is drawn without tiles.

        Args:
          path: a folder of diffusers, a file of the original layout, or a workdir.
          scale: of its effect; another one compiles nothing.
          name: of its hint; default: "control", then "control_2", and so on.

        Raises:
          ValueError: the file holds none, one for another model, or the name is taken.
        """
        return self._changed(*add_control(path, self.config, self.params, scale, name))

    def with_ip_adapter(
        self, path: str | Path, encoder: str | Path = "", scale: float = 1.0, name: str = ""
    ) -> "Pipeline":
        """This pipeline with an IP-Adapter, a file, which needs a picture of any size beside the
        prompt: `conditions={"image_prompt": picture}`. Several add up. Other arguments and errors
        are those of `add_ip_adapter`; another scale compiles nothing.
        """
        return self._changed(*add_ip_adapter(path, encoder, self.config, self.params, scale, name))

    def _changed(self, config: dict[str, Any], params: dict[str, Any]) -> "Pipeline":
        """This pipeline with other conditions in its config, and their parameters."""
        model = LatentDiffusion.from_config(config, self.unet.dtype)
        # Schedules are equal only to themselves, and an equal model compiles nothing.
        model = dataclasses.replace(model, diffusion=self.model.diffusion)
        made = dataclasses.replace(self, model=model, params=jax.device_put(params), config=config)
        return made.with_prompt_syntax(self.prompt_syntax)

    def with_scales(self, *scales: float) -> "Pipeline":
        """This pipeline with other scales of its LoRAs, one for each."""
        check_finite(scales=scales)
        if len(scales) != len(self.loras):
            raise ValueError(f"{len(scales)} scales for {len(self.loras)} LoRAs")
        loras = tuple((lora, s) for (lora, _), s in zip(self.loras, scales, strict=True))
        return dataclasses.replace(self, loras=loras)

    def merged(self) -> "Pipeline":
        """This pipeline with its LoRAs merged into the parameters."""
        return dataclasses.replace(self, params=jax.jit(merged)(self._weights), loras=())

    def save(self, path: str | Path, dtype: str = "float32", layout: str = "single_file") -> None:
        """Writes the model with its LoRAs merged; `load` opens the result.

        Args:
          layout: "single_file", one .safetensors with its config; "diffusers", a folder; "compvis",
            one .safetensors with the names of CompVis' and Stability's code.

        Raises:
          ValueError: an unknown dtype or layout, or a layout that cannot express this model.
        """
        export(path, self.config, self.merged().params, dtype, layout)

    def _tile(self, tile: int | None, shape: tuple[int, int, int]) -> int:
        """The side of a tile in latents; 0 without tiles, or if the picture is not larger."""
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

    @functools.cached_property
    def _on_all_devices(self) -> Weights:
        """`_weights` on every device of this process."""
        mesh = local_mesh(0)
        return jax.device_put(self._weights, replicated(mesh))

    @property
    def _weights(self) -> Weights:
        """Parameters and LoRAs, with scales as arrays, so that a new scale compiles nothing."""
        return self.params, tuple((lora, np.float32(scale)) for lora, scale in self.loras)
