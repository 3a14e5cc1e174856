"""Stage 2: the denoiser and its text encoder, on latents that are encoded once and cached."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.data.loader import batches_once
from ldm_jax.diffusion.noise import example_keys, per_example
from ldm_jax.inputs import inputs_for, nulls_for, requests, told_sizes
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.build import Autoencoder
from ldm_jax.pictures import image_grid, to_float, to_uint8
from ldm_jax.training.batches import training_batches

PICTURE_AUGMENTS = ("flip", "zoom", "shift", "color", "background")
UNCONDITIONAL_PREVIEWS = 5  # columns of the sample grid
HELD_OUT_DRAWS = 8  # noise and timesteps per held-out picture: one draw is too noisy to compare


class LatentSource(Sequence):
    """A source whose pictures are replaced by their posterior's moments, (h, w, 2c) float32.

    Everything else of an example stays, so captions can still be augmented.
    """

    def __init__(self, source: Any, autoencoder: Autoencoder, params: dict[str, Any]):
        @jax.jit
        def moments(params, images):
            mean, logvar = autoencoder.apply({"params": params}, to_float(images), method="moments")
            return jnp.concatenate([mean, logvar], axis=-1)

        encoded = [
            np.asarray(moments(params, batch["image"]))[batch["valid"]]
            for batch in batches_once(source, 32)
        ]
        self.moments = np.concatenate(encoded)
        pixels = ("image", "rgba", "background")
        self._rest = [
            {k: v for k, v in source[i].items() if k not in pixels} for i in range(len(source))
        ]

    def __len__(self) -> int:
        return len(self._rest)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rest[index] | {"image": self.moments[index]}


@dataclasses.dataclass(frozen=True)
class DiffusionTask:
    """See `ldm_jax.training.state.Task`.

    `resolved` is the config as plain values with the first stage's fields in it, what an exported
    model carries; `first_stage` are the frozen autoencoder's parameters.
    """

    config: Any
    resolved: dict[str, Any]
    model: LatentDiffusion
    first_stage: dict[str, Any]
    source: LatentSource
    held_out: LatentSource

    @property
    def networks(self) -> tuple[str, ...]:
        return self.model.trainable

    @property
    def ema_networks(self) -> tuple[str, ...]:
        return self.model.trainable

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.source.moments.shape[1:]
        return height, width, channels // 2

    def init(self, key):
        return self.model.init(key, self.latent_shape)

    def phase(self, step):
        del step

    def gradients(self, params, batch, key, phase):
        del phase
        latents = self._sample_latents(batch["moments"], jax.random.fold_in(key, 0))

        def loss(params):
            inputs = {e.name: batch[e.name] for e in self.model.embedders}
            return jnp.mean(self.model.loss(params, latents, inputs, jax.random.fold_in(key, 1)))

        value, grads = jax.value_and_grad(loss)(params)
        return grads, {"loss": value}

    def batches(self, start):
        for step, batch in training_batches(self.config, self.source, start):
            yield step, {"moments": batch["image"]} | self._inputs(batch)

    def evaluate(self, ema):
        """The loss on held-out pictures, at fixed noise and timesteps, without any dropout."""
        losses, key = [], jax.random.key(self.config.seed)
        for i, batch in enumerate(batches_once(self.held_out, 64)):
            for draw in range(HELD_OUT_DRAWS):
                draw_key = jax.random.fold_in(key, i * HELD_OUT_DRAWS + draw)
                values = self._held_out_loss(ema, batch["image"], self._inputs(batch), draw_key)
                losses.append(np.asarray(values)[batch["valid"]])
        return {"loss": float(np.mean(np.concatenate(losses)))}

    def preview(self, ema):
        """Samples of the averaged model for `config.sampling`'s prompts or labels, in two rows."""
        settings, embedders = self.config.sampling, self.model.embedders
        needed = {key for embedder in embedders for key in embedder.needs}
        prompts = list(settings.prompts) if "caption" in needed else None
        labels = list(settings.get("labels", (0,))) if "label" in needed else None
        (told,) = requests(embedders, prompts, labels)
        columns = max((len(values) for values in told.values()), default=UNCONDITIONAL_PREVIEWS)
        count = 2 * columns
        sizes = told_sizes(count, [self.config.data.image_size] * 2)
        told = {key: values * 2 for key, values in told.items()}
        inputs = inputs_for(embedders, told | sizes, count)
        images = self._generate(
            {**ema, "autoencoder": self.first_stage},
            inputs,
            nulls_for(embedders, inputs, "", sizes, count),
            example_keys(jax.random.key(0), count),
        )
        return image_grid(to_uint8(images), columns)

    def export(self, ema):
        kept = ("task", "autoencoder", "unet", "conditioning", "diffusion", "sampling")
        about = {name: self.resolved[name] for name in kept}
        about["image_size"] = self.latent_shape[0] * self.model.autoencoder.downsampling
        return about, {**ema, "autoencoder": self.first_stage}

    def _inputs(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        sizes = told_sizes(len(batch["image"]), [self.config.data.image_size] * 2)
        return {e.name: e.prepare(sizes | batch) for e in self.model.embedders}

    def _sample_latents(self, moments: jax.Array, key: jax.Array) -> jax.Array:
        mean, logvar = jnp.split(moments, 2, axis=-1)
        noise = per_example(jax.random.normal, key, mean.shape)
        return (mean + jnp.exp(0.5 * logvar) * noise) * self.model.autoencoder.scale_factor

    @functools.cached_property
    def _held_out_loss(self):
        @jax.jit
        def loss(params, moments, inputs, key):
            latents = self._sample_latents(moments, jax.random.fold_in(key, 0))
            key = jax.random.fold_in(key, 1)
            return self.model.loss(params, latents, inputs, key, training=False)

        return loss

    @functools.cached_property
    def _generate(self):
        settings = self.config.sampling
        levels = self.model.levels(settings.steps)
        run = self.model.plan(settings.sampler, levels, settings.guidance, eta=settings.eta)

        @jax.jit
        def generate(params, inputs, nulls, keys):
            return self.model.generate(
                params,
                [inputs],
                nulls,
                keys,
                run,
                latent_shape=self.latent_shape,
                sampler=settings.sampler,
            )

        return generate
