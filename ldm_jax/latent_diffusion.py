"""A latent diffusion model: its networks, its schedule, and the two things done with them.

`loss` is what training descends (Rombach et al. 2022, eq. 3); `generate` is the whole way from
conditions to pictures as one program. Both are pure functions of `params`, a dict of every
network's parameters by name.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning import (
    Conditioning,
    Inputs,
    TextEmbedder,
    drop_conditions,
    embed,
    make_embedders,
)
from ldm_jax.diffusion.guidance import classifier_free
from ldm_jax.diffusion.noise import example_keys, per_example
from ldm_jax.diffusion.objective import per_example_loss, uniform_timesteps
from ldm_jax.diffusion.parameterization import Prediction, target, to_prediction
from ldm_jax.diffusion.samplers import get_sampler, sample
from ldm_jax.diffusion.schedule import Schedule, make_schedule, sampling_timesteps
from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.models.unet import UNet

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
    """The static half of a model; the other half is `params`."""

    unet: UNet
    autoencoder: AutoencoderKL
    embedders: tuple[TextEmbedder, ...]
    schedule: Schedule
    parameterization: str
    loss_type: str
    spacing: str

    @property
    def latent_channels(self) -> int:
        return self.unet.in_channels

    @classmethod
    def from_config(cls, config: dict[str, Any], dtype: Any = None) -> "LatentDiffusion":
        """Builds the networks of a config's `unet`, `autoencoder`, `conditioning`, `diffusion`.

        `dtype` is their type of arithmetic; None: that of the parameters and inputs.
        """
        diffusion = config["diffusion"]
        return cls(
            unet=UNet(**_tuples(config["unet"]), dtype=dtype),
            autoencoder=make_autoencoder(config["autoencoder"], dtype),
            embedders=make_embedders(config["conditioning"], dtype),
            schedule=make_schedule(**diffusion["schedule"]),
            parameterization=diffusion["parameterization"],
            loss_type=diffusion["loss"],
            spacing=diffusion["spacing"],
        )

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the networks that train: all but the first stage."""
        return ("unet", *(embedder.name for embedder in self.embedders))

    def init(self, key: jax.Array, latent_shape: tuple[int, ...]) -> Params:
        """Fresh parameters of the trainable networks; `latent_shape` is (h, w, c)."""
        unet_key, embed_key = jax.random.split(key)
        params = {}
        for i, embedder in enumerate(self.embedders):
            inputs = jnp.asarray(embedder.null(1))
            params[embedder.name] = embedder.network.init(jax.random.fold_in(embed_key, i), inputs)[
                "params"
            ]
        nulls = {embedder.name: jnp.asarray(embedder.null(1)) for embedder in self.embedders}
        condition = embed(self.embedders, params, nulls)
        latents = jnp.zeros((1, *latent_shape))
        params["unet"] = self.unet.init(unet_key, latents, jnp.zeros(1), condition.context)[
            "params"
        ]
        return params

    def loss(
        self,
        params: Params,
        latents: jax.Array,
        inputs: Inputs,
        key: jax.Array,
        training: bool = True,
    ) -> jax.Array:
        """Per-example loss (B,) on scaled latents (B, h, w, c).

        `training` turns on the dropout of conditions and of the networks. All that is random is
        drawn from each example's own key, except the networks' dropout.
        """
        keys = {
            name: jax.random.fold_in(key, i)
            for i, name in enumerate(("timestep", "noise", "condition", "dropout"))
        }
        t = uniform_timesteps(keys["timestep"], len(latents), self.schedule.timesteps)
        eps = per_example(jax.random.normal, keys["noise"], latents.shape)
        if training:
            example = example_keys(keys["condition"], len(latents))
            inputs = drop_conditions(self.embedders, inputs, example)
        condition = embed(self.embedders, params, inputs, keys["dropout"] if training else None)
        alpha, sigma = self._levels(t)
        output = self.unet.apply(
            {"params": params["unet"]},
            alpha * latents + sigma * eps,
            t,
            condition.context,
            deterministic=not training,
            rngs={"dropout": jax.random.fold_in(keys["dropout"], len(self.embedders))},
        )
        goal = target(self.parameterization, latents, eps, alpha, sigma)
        return per_example_loss(self.loss_type, output, goal)

    def generate(
        self,
        params: Params,
        inputs: Inputs,
        nulls: Inputs,
        keys: jax.Array,
        coefficients: dict[str, np.ndarray],
        guidance: jax.Array,
        eta: jax.Array,
        *,
        latent_shape: tuple[int, ...],
        sampler: str = "ddim",
        guided: bool = True,
        latents: jax.Array | None = None,
        progress: Any = None,
    ) -> jax.Array:
        """Pictures (B, H, W, 3) in [0, 1]: conditions in, the whole loop, decoding.

        `keys` (B,) are the examples' own; `latents` (B, h, w, c), unit Gaussian, replace the
        starting noise drawn from them. `guided` off evaluates the network once a step.
        """
        if latents is None:
            latents = jax.vmap(lambda key: jax.random.normal(key, latent_shape))(keys)
        condition, null = (embed(self.embedders, params, each) for each in (inputs, nulls))

        def network(x, t, condition: Conditioning):
            return self.unet.apply({"params": params["unet"]}, x, t, condition.context)

        if guided:
            predict = classifier_free(network, condition, null, guidance)
        else:

            def predict(x, t):
                return network(x, t, condition)

        def denoise(x, t) -> Prediction:
            alpha, sigma = self._levels(t)
            output = predict(x, jnp.broadcast_to(t, x.shape[:1])).astype(x.dtype)
            return to_prediction(self.parameterization, output, x, alpha, sigma)

        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        clean = sample(
            get_sampler(sampler), denoise, latents, coefficients, step_keys, eta, progress
        )
        images = self.autoencoder.apply(
            {"params": params["autoencoder"]}, clean, method=self.autoencoder.decode
        )
        return jnp.clip((images + 1.0) / 2.0, 0.0, 1.0)

    def coefficients(self, sampler: str, steps: int) -> dict[str, np.ndarray]:
        """The numbers of every step of a sampler for this model's schedule."""
        timesteps = sampling_timesteps(self.schedule.timesteps, steps, self.spacing)
        to_clean = self.spacing != "compat"
        return get_sampler(sampler).coefficients(self.schedule, timesteps, to_clean)

    def _levels(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """α_t and σ_t for integer t (B,) or (), shaped to broadcast against latents."""
        levels = (self.schedule.alpha, self.schedule.sigma)
        tables = (jnp.asarray(table, jnp.float32)[t] for table in levels)
        alpha, sigma = (value.reshape(value.shape + (1,) * (3 * value.ndim)) for value in tables)
        return alpha, sigma


def make_autoencoder(fields: dict[str, Any], dtype: Any = None) -> AutoencoderKL:
    """The autoencoder of a config's section `autoencoder`."""
    return AutoencoderKL(**_tuples(fields), dtype=dtype)


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that make a Flax module hashable."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
