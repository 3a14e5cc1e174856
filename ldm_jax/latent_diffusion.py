"""A latent diffusion model: its networks, its schedule, and the two things done with them.

`loss` is what training descends (Rombach et al. 2022, eq. 3); `generate` is the whole way from
conditions to pictures as one program. Both are pure functions of `params`, a dict of every
network's parameters by name.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning import (
    Conditioning,
    Embedder,
    Inputs,
    drop_conditions,
    embed,
)
from ldm_jax.diffusion.editing import keep_known, noised, tiled
from ldm_jax.diffusion.grids import sampling_levels
from ldm_jax.diffusion.guidance import (
    autoguidance,
    classifier_free,
    dynamic_threshold,
    guidance_weights,
    where_guided,
)
from ldm_jax.diffusion.multistep import Table
from ldm_jax.diffusion.noise import example_keys
from ldm_jax.diffusion.objective import Objective, diffusion_loss
from ldm_jax.diffusion.parameterization import SIGMA_DATA, Network, Prediction, make_denoiser
from ldm_jax.diffusion.samplers import DDIM_INVERSE, get_sampler, make_table, sample
from ldm_jax.diffusion.schedule import Level, Schedule, make_schedule
from ldm_jax.embedders import make_embedders
from ldm_jax.models.build import Autoencoder, make_autoencoder, tuples
from ldm_jax.models.unet import UNet

Params = dict[str, Any]


class Guidance(NamedTuple):
    """Guidance of every step: the scale (S,), the weights of several conditions (S, K), how far to
    rescale (S,), and where it is on at all (S,), None for everywhere."""

    scale: np.ndarray
    weights: np.ndarray
    rescale: np.ndarray
    active: np.ndarray | None


class Run(NamedTuple):
    """What is traced of a run of the sampler; its structure, not its numbers, decides the program.

    `start` is the level of the first step, `percentile` that of dynamic thresholding, None: off.
    """

    table: Table
    guidance: Guidance | None
    start: Level
    percentile: float | None


class Edit(NamedTuple):
    """A picture to start from: its latents `known` (B, h, w, c), and, if only part of it is to
    change, `mask` (B, h, w, 1), 1 where it does and 0 where it stays."""

    known: jax.Array
    mask: jax.Array | None


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
    """The static half of a model; the other half is `params`."""

    unet: UNet
    autoencoder: Autoencoder
    embedders: tuple[Embedder, ...]
    schedule: Schedule
    parameterization: str
    spacing: str
    objective: Objective = Objective()
    sigma_data: float = SIGMA_DATA
    offset: int | None = None
    end: str | None = None

    @property
    def latent_channels(self) -> int:
        """Not the UNet's inputs, of which some may be a condition."""
        return self.unet.out_channels

    @classmethod
    def from_config(cls, config: dict[str, Any], dtype: Any = None) -> "LatentDiffusion":
        """Builds the networks of a config's `unet`, `autoencoder`, `conditioning`, `diffusion`.

        `dtype` is their type of arithmetic; None: that of the parameters and inputs.
        """
        diffusion = config["diffusion"]
        autoencoder = make_autoencoder(config["autoencoder"], dtype)
        return cls(
            unet=UNet(**tuples(config["unet"]), dtype=dtype),
            autoencoder=autoencoder,
            embedders=make_embedders(config["conditioning"], dtype, autoencoder),
            schedule=make_schedule(**diffusion["schedule"]),
            parameterization=diffusion["parameterization"],
            spacing=diffusion["spacing"],
            objective=Objective(**config.get("objective", {})),
            sigma_data=diffusion.get("sigma_data", SIGMA_DATA),
            offset=diffusion.get("offset"),
            end=diffusion.get("end"),
        )

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of what trains: all but the first stage."""
        logvar = ("logvar",) if self.objective.learn_logvar else ()
        embedders = (embedder.name for embedder in self.embedders if embedder.network is not None)
        return ("unet", *embedders, *logvar)

    def init(self, key: jax.Array, latent_shape: tuple[int, ...]) -> Params:
        """Fresh parameters of the trainable networks; `latent_shape` is (h, w, c)."""
        unet_key, embed_key = jax.random.split(key)
        params = {}
        nulls = {embedder.name: jnp.asarray(embedder.null(1)) for embedder in self.embedders}
        for i, embedder in enumerate(self.embedders):
            if embedder.network is not None:
                # −1 stands for "no prompt" where that is not encoded.
                inputs = jnp.maximum(nulls[embedder.name], 0)
                variables = embedder.network.init(jax.random.fold_in(embed_key, i), inputs)
                params[embedder.name] = variables["params"]
        if any(hasattr(embedder, "parameters") for embedder in self.embedders):
            side = self.autoencoder.downsampling
            images = jnp.zeros((1, side, side, self.autoencoder.in_channels))
            first_stage = self.autoencoder.init(key, images).get("params", {})
        else:
            first_stage = None
        condition = embed(self.embedders, params | {"autoencoder": first_stage}, nulls)
        x = beside(jnp.zeros((1, *latent_shape)), condition)
        variables = self.unet.init(unet_key, x, jnp.zeros(1), condition.context, y=condition.vector)
        params["unet"] = variables["params"]
        if self.objective.learn_logvar:
            params["logvar"] = {
                "value": jnp.full(self.schedule.timesteps, self.objective.logvar_init)
            }
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
        noise_key, condition_key, dropout_key = (jax.random.fold_in(key, i) for i in range(3))
        if training:
            example = example_keys(condition_key, len(latents))
            inputs = drop_conditions(self.embedders, inputs, example)
        condition = embed(self.embedders, params, inputs, dropout_key if training else None)
        rngs = {"dropout": jax.random.fold_in(dropout_key, len(self.embedders))}

        def network(x, t):
            return self.unet.apply(
                {"params": params["unet"]},
                beside(x, condition),
                t,
                condition.context,
                y=condition.vector,
                deterministic=not training,
                rngs=rngs,
            )

        return diffusion_loss(
            self.objective,
            self.schedule,
            self.parameterization,
            network,
            latents,
            noise_key,
            params["logvar"]["value"] if self.objective.learn_logvar else None,
            self.sigma_data,
        )

    def predict(
        self, params: Params, conditions: list[Conditioning], null: Conditioning, tile: int = 0
    ) -> Callable[[Guidance | None], Network]:
        """The network under guidance: `predict(guidance)(x, t)`, for any step's guidance.

        `guidance` None evaluates the first condition alone. With `tile`, latents larger than that
        many rows or columns are worked on in overlapping tiles.
        """

        def whole(x, t, condition: Conditioning):
            variables = {"params": params["unet"]}
            return self.unet.apply(variables, x, t, condition.context, y=condition.vector)

        def network(x, t, condition: Conditioning):
            x = beside(x, condition)
            if not tile:
                return whole(x, t, condition)
            condition = condition.replace(concat=None)  # cut into tiles with x

            def parts(x):
                def repeat(v):
                    return jnp.tile(v, (len(x) // len(t), *[1] * (v.ndim - 1)))

                return whole(x, repeat(t), jax.tree.map(repeat, condition))

            return tiled(parts, x, (tile, tile))

        def under(guidance: Guidance | None) -> Network:
            def plain(x, t):
                return network(x, t, conditions[0])

            if guidance is None:
                return plain
            guided = classifier_free(
                network, conditions, null, guidance.scale, guidance.weights, guidance.rescale
            )
            return (
                guided if guidance.active is None else where_guided(guided, plain, guidance.active)
            )

        return under

    def generate(
        self,
        params: Params,
        inputs: list[Inputs],
        nulls: Inputs,
        keys: jax.Array,
        run: Run,
        edit: Edit | None = None,
        *,
        latent_shape: tuple[int, ...],
        sampler: str = "ddim",
        latents: jax.Array | None = None,
        tile: int = 0,
        weak: "tuple[LatentDiffusion, Params] | None" = None,
        callback: Any = None,
    ) -> jax.Array:
        """Pictures (B, H, W, C) in [0, 1]: conditions in, the whole loop, decoding.

        Args:
          inputs: one set of the embedders' inputs, or several to be combined by `guidance.weights`.
          keys: (B,), the examples' own.
          run: the tables of the sampler and of guidance, from `plan`.
          edit: what to start from, and what to keep, instead of drawing from noise alone.
          latents: (B, h, w, c), unit Gaussian, in place of the starting noise drawn from `keys`.
          tile: the latents' side from which on they are worked on in tiles; 0: never.
          weak: a worse model and its parameters, to be guided away from (autoguidance).
        """
        if latents is None:
            latents = jax.vmap(lambda key: jax.random.normal(key, latent_shape))(keys)
        conditions = [embed(self.embedders, params, each) for each in inputs]
        predict = self.predict(params, conditions, embed(self.embedders, params, nulls), tile)
        if weak is not None:
            weak_model, weak_params = weak
            weak_condition = embed(weak_model.embedders, weak_params, inputs[0])
            worse = weak_model.predict(weak_params, [weak_condition], weak_condition, tile)(None)

        def denoise(x, level, guidance: Guidance | None = None) -> Prediction:
            network = predict(guidance if weak is None else None)
            if weak is not None and guidance is not None:
                network = autoguidance(network, worse, guidance.scale)
            inner = make_denoiser(self.parameterization, network, self.sigma_data)
            if run.percentile is not None:
                inner = dynamic_threshold(inner, run.percentile)
            return inner(x, level)

        start, before_step = run.start, None
        if edit is None:
            x = latents * jnp.sqrt(start.alpha**2 + start.sigma**2)
        else:
            x = noised(edit.known, latents, start)
            if edit.mask is not None:
                before_step = keep_known(edit.known, edit.mask)
        clean = sample(
            get_sampler(sampler),
            denoise,
            x,
            run.table,
            jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys),
            per_step=run.guidance,
            before_step=before_step,
            callback=callback,
        )
        if edit is not None and edit.mask is not None:
            clean = edit.mask * clean + (1.0 - edit.mask) * edit.known
        return self.decode(params, clean, tile)

    def invert(self, params: Params, inputs: Inputs, latents: jax.Array, table: Table) -> jax.Array:
        """Starting noise (B, h, w, c) from which DDIM, without guidance, draws these latents."""
        condition = embed(self.embedders, params, inputs)
        network = self.predict(params, [condition], condition)(None)
        denoise = make_denoiser(self.parameterization, network, self.sigma_data)
        keys = example_keys(jax.random.key(0), len(latents))
        return sample(DDIM_INVERSE, denoise, latents, table, keys)

    def decode(self, params: Params, latents: jax.Array, tile: int = 0) -> jax.Array:
        """Scaled latents (B, h, w, c) → pictures (B, H, W, C) in [0, 1]."""

        def decode(latents):
            variables = {"params": params["autoencoder"]}
            return self.autoencoder.apply(variables, latents, method=self.autoencoder.decode)

        if tile:
            images = tiled(decode, latents, (tile, tile), scale=self.autoencoder.downsampling)
        else:
            images = decode(latents)
        return jnp.clip((images + 1.0) / 2.0, 0.0, 1.0)

    def levels(self, steps: int, spacing: str | None = None) -> Level:
        """The `steps` + 1 noise levels of a run; spacing None is the model's own."""
        own = {} if spacing else {"offset": self.offset, "end": self.end}
        return sampling_levels(self.schedule, steps, spacing or self.spacing, **own)

    def plan(
        self,
        sampler: str,
        levels: Level,
        guidance: float | np.ndarray = 1.0,
        *,
        interval: tuple[float, float] | None = None,
        weights: np.ndarray | None = None,
        rescale: float = 0.0,
        percentile: float | None = None,
        skip: int | None = None,
        **options: float | None,
    ) -> Run:
        """The tables of a run, on the host. Guidance of 1 at every step is left out altogether.

        Raises:
          ValueError: an option, a guidance or an interval out of its range.
        """
        if not 0.0 <= rescale <= 1.0:
            raise ValueError(f"guidance rescale {rescale:g}: must lie in 0…1")
        if percentile is not None and not 0.0 < percentile <= 1.0:
            raise ValueError(f"threshold percentile {percentile:g}: must lie above 0 and up to 1")
        steps = len(levels.t) - 1
        longest = getattr(self.schedule, "timesteps", None) or self.schedule.sigma_max
        scale = guidance_weights(guidance, levels, longest, interval)
        weights = np.ones(1) if weights is None else np.asarray(weights)
        start = Level(*(np.float32(v[skip or 0]) for v in levels))
        table = make_table(sampler, self.schedule, levels, skip, **options)
        on = scale != 1.0
        if len(weights) == 1 and not on.any():
            return Run(table, None, start, percentile)
        steps_of = Guidance(
            scale=np.float32(scale),
            weights=np.tile(np.float32(weights), (steps, 1)),
            rescale=np.full(steps, rescale, np.float32),
            active=None if len(weights) > 1 or on.all() else on,
        )
        return Run(table, steps_of, start, percentile)


def beside(x: jax.Array, condition: Conditioning) -> jax.Array:
    """x (B, h, w, c) and, after its channels, those of `condition.concat`, if there is one."""
    if condition.concat is None:
        return x
    concat = condition.concat.astype(x.dtype)
    concat = jnp.broadcast_to(concat, (*x.shape[:3], concat.shape[-1]))
    return jnp.concatenate([x, concat], axis=-1)
