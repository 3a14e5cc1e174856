"""Stage 2: the denoiser and its conditions, on latents of a frozen autoencoder."""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditions.base import Embedder
from ldm_jax.conditions.kinds import SIZES
from ldm_jax.data.condition_kinds import Condition
from ldm_jax.data.loader import Batch, batches_once
from ldm_jax.diffusion.mean_flow import MeanFlow
from ldm_jax.diffusion.noise import Examples
from ldm_jax.interop.changes import separated
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pictures import image_grid, to_uint8
from ldm_jax.pipeline import Pipeline
from ldm_jax.runtime.mesh import on_one_device
from ldm_jax.training import validation
from ldm_jax.training.accumulation import mean_over_parts
from ldm_jax.training.batches import Prepare, about_data, training_loader
from ldm_jax.training.distillation import TEACHER, Distillation
from ldm_jax.training.distillation import Options as Distill
from ldm_jax.training.evaluators import options_of
from ldm_jax.training.latents import LatentSource, moments, sample_latents
from ldm_jax.training.mean_flow import MeanFlowTraining
from ldm_jax.training.methods import Adapters
from ldm_jax.training.state import Params
from ldm_jax.training.summary import first_latents, first_pictures, log_summary
from ldm_jax.training.trainable import merge, split

log = logging.getLogger(__name__)

UNASKED_PREVIEWS = 5  # columns of the sample grid, where the config names no prompts or labels
HELD_OUT_BATCH = 64
LOSS_MASK = "loss_mask"  # the condition of data that says how much of the loss counts where
KEPT = ("task", "autoencoder", "unet", "conditioning", "diffusion", "sampling")


@dataclasses.dataclass(frozen=True)
class DiffusionTask:
    """See `ldm_jax.training.state.Task`.

    `embedders` are those of training: `model.embedders` or their replacements. `resolved` is the
    config as plain values, completed by the model that training starts from; it is exported with
    the model. `frozen` includes the autoencoder's parameters. With `adapters`, their factors train,
    or the vectors of a new token, or a ControlNet, and nothing else. With `distill`, the UNet of
    `model` or its factors learn from the one in `frozen`. `mean_flow` are the options of a model
    of this kind.
    """

    config: Any
    resolved: dict[str, Any]
    model: LatentDiffusion
    embedders: tuple[Embedder, ...]
    frozen: Params
    loaded: Params
    source: Any
    held_out: Any
    conditions: tuple[Condition, ...]
    adapters: Adapters | None = None
    distill: Distill | None = None
    mean_flow: MeanFlow | None = None

    @property
    def ema_networks(self) -> tuple[str, ...]:
        return self.model.trainable

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.config.data.image_size // self.model.autoencoder.downsampling
        return side, side, self.model.latent_channels

    @property
    def entries(self) -> tuple[str, ...]:
        """The entries of a batch: the latents' moments, or the pictures to encode, the entries
        that the embedders need, and the mask of the loss if the data have one."""
        pixels = "moments" if getattr(self.source, "latents", False) else "image"
        both = (*self.model.embedders, *self.embedders)
        needs = (entry for embedder in both for entry in embedder.needs)
        return tuple(dict.fromkeys((pixels, *needs, *self._loss_mask)))

    @property
    def _loss_mask(self) -> tuple[str, ...]:
        """The entry LOSS_MASK, if a condition makes it."""
        return tuple({LOSS_MASK} & {entry for c in self.conditions for entry in c.entries})

    def init(self, key, loaded):
        if self.adapters is not None:
            return self.adapters.init(key, self.frozen, loaded)
        fresh = self.model.init(key, self.latent_shape)
        return split(merge(fresh, loaded), self.config.trainable)[0]

    def phase(self, step):
        del step

    def gradients(self, params, frozen, batch, key, phase):
        del phase

        def of_part(rows, examples):
            latents = self._latents(frozen, rows, jax.random.fold_in(key, 0), examples)
            inputs = {e.name: rows[e.name] for e in self.embedders}
            mask = rows.get(LOSS_MASK)
            if mask is not None and mask.shape[1:3] != latents.shape[1:3]:
                sides = "the mask has {}×{}, and the latents {}×{}".format(
                    *mask.shape[1:3], *latents.shape[1:3]
                )
                raise ValueError(f"data.conditions.{LOSS_MASK}.factor: {sides}")

            def loss(params):
                whole, own = merge(frozen, params), jax.random.fold_in(key, 1)
                losses = self._objective.loss(
                    whole, latents, inputs, own, examples=examples, mask=mask
                )
                return jnp.mean(losses)

            return jax.value_and_grad(loss)(params)

        parts = self.config.train.get("accumulate", 1)
        value, grads = mean_over_parts(of_part, batch, parts)
        return grads, {"loss": value}

    def batches(self, start):
        prepare = Prepare(self.config.data.augment, self.conditions)
        if isinstance(self.source, LatentSource):
            _ = self.source.moments  # before the loader's threads read them
        loader = training_loader(self.config, self.source, prepare, self.entries)
        for step, batch in loader.iterate(start):
            yield step, self._batch(batch)

    def summary(self):
        log_summary(self.source, self.held_out, self.model.embedders)

    def first_batch_picture(self, start):
        prepare = Prepare(self.config.data.augment, self.conditions)
        if not hasattr(self.source, "states"):
            return first_pictures(self.config, self.source, prepare, start)
        return first_latents(self.config, self.source, prepare, start, self._decode)

    def _decode(self, latents: np.ndarray) -> np.ndarray | None:
        """Pictures of unscaled latents, from this process alone; None if it has not all of the
        autoencoder."""
        params = self.frozen["autoencoder"]
        if not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params)):
            return None
        with on_one_device():
            decode, params = jax.jit(self.model.decode), jax.tree.map(np.asarray, params)
            scaled = latents * self.model.autoencoder.scale_factor
            return to_uint8(np.asarray(decode({"autoencoder": params}, scaled)))

    def evaluate(self, ema):
        """The validation loss, see `validation.py`; with adapters, also that of the model without
        them."""
        found = validation.summary(self._errors(ema))
        if not found or self.adapters is None:
            return found
        base = self._base_loss
        log.info("Held-out loss %.4f; of the model without adapters %.4f", found["loss"], base)
        return found | {"loss_of_base": base}

    @functools.cached_property
    def _base_loss(self) -> float:
        return validation.summary(self._errors({}))["loss"]

    def _errors(self, ema: Params) -> np.ndarray:
        options = options_of(self.config, "validation_loss")
        size = options["batch_size"] or min(HELD_OUT_BATCH, self.config.train.batch_size)
        count = min(options["count"] or len(self.held_out), len(self.held_out))

        def batches():
            for batch in self._in_order(self.held_out, size):
                valid = batch["valid"] & (batch["index"] < count)
                if not valid.any():
                    return
                yield self._batch(batch), batch["index"], valid

        def losses(*arguments):
            return self._losses(self.frozen, ema, *arguments)

        return validation.errors(losses, batches())

    def preview(self, ema):
        """Samples of the averaged model in two rows; with adapters, the first row is of the model
        without them.

        Their prompts or labels are `sampling.prompts` or `.labels`; without these, and for all
        other conditions, those of held-out pictures.
        """
        sampling = self.resolved["sampling"]
        asked = {"caption": sampling.get("prompts"), "label": sampling.get("labels")}
        asked = {k: list(v) for k, v in asked.items() if v and k in self.entries}
        columns = max(map(len, asked.values()), default=UNASKED_PREVIEWS)
        count = 2 * columns if self.adapters is None else columns
        batch = next(self._in_order(self.held_out or self.source, count))
        batch |= {entry: (values * count)[:count] for entry, values in asked.items()}
        needed = {entry for e in self.model.embedders for entry in e.needs}
        others = needed - SIZES.keys() - {"caption", "label", "image", "mask"}
        given = {entry: batch[entry] for entry in needed}
        rows = [
            pipe(
                given.get("caption"),
                n=1 if {"caption", "label"} & given.keys() else count,
                labels=given.get("label"),
                image=given.get("image"),
                mask=given.get("mask"),
                conditions={entry: given[entry] for entry in others},
                steps=sampling["steps"],
            )
            for pipe in self.pipelines(ema)
        ]
        images = np.concatenate(rows)
        return image_grid(to_uint8(images[..., :3]), columns)

    def pipelines(self, ema: Params) -> list[Pipeline]:
        """What draws with averaged parameters; with adapters, before it the model without them."""
        config = self.resolved | {"image_size": self.config.data.image_size}
        params, lora = separated(self._whole(ema))
        drawn = [Pipeline(self.model, params, config, ((lora, 1.0),) if lora else ())]
        if self.adapters is not None:
            base = separated(self._whole({}))[0]
            drawn.insert(0, Pipeline(self.model, base, config))
        return drawn

    def export(self, ema):
        about = {name: self.resolved[name] for name in KEPT}
        about["image_size"] = self.config.data.image_size
        about["data"] = about_data(self.config)
        if any("label" in embedder.needs for embedder in self.model.embedders):
            about["classes"] = list(self.source.classes)
        if self.adapters is not None:
            return about | {"base": self.adapters.base}, merge(self.adapters.scales(), ema)
        return about, self._whole(ema)

    def _whole(self, ema: Params) -> Params:
        """The parameters of the model."""
        params = merge(self.frozen, ema)
        return {name: part for name, part in params.items() if name != TEACHER}

    def _batch(self, batch: Batch) -> dict[str, np.ndarray]:
        """The entries of a loader's batch that a step uses."""
        pixels = self.entries[0]
        entries = (pixels, *self._loss_mask)
        return {entry: batch[entry] for entry in entries} | {
            e.name: e.prepare(batch) for e in self.embedders
        }

    @property
    def _objective(self) -> LatentDiffusion | Distillation | MeanFlowTraining:
        """What has the loss."""
        if self.mean_flow is not None:
            return MeanFlowTraining(self._model, self.mean_flow)
        return self._model if self.distill is None else Distillation(self._model, self.distill)

    @property
    def _model(self) -> LatentDiffusion:
        """The model in training."""
        return dataclasses.replace(self.model, embedders=self.embedders)

    def _latents(
        self,
        frozen: Params,
        batch: dict[str, Any],
        key: jax.Array,
        examples: Examples | None = None,
    ) -> jax.Array:
        autoencoder = self.model.autoencoder
        made = batch.get("moments")
        if made is None:
            made = moments(autoencoder, frozen["autoencoder"], batch["image"])
        return sample_latents(autoencoder, made, key, examples)

    def _in_order(self, source: Any, batch_size: int):
        """Every picture of a source once, without augmentation."""
        return batches_once(source, batch_size, Prepare((), self.conditions), self.entries)

    @functools.cached_property
    def _losses(self):
        return validation.losses_at(self._model, self._latents, merge, self.distill)
