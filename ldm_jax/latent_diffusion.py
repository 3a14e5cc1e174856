"""A latent diffusion model: its networks and schedule, its loss, and its sampling program.

Training minimises `loss` (Rombach et al. 2022, eq. 3); `generate` makes pictures from conditions in
one program. Both are pure functions of `params`, a dict of every network's parameters by name.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from ldm_jax.conditions.base import (
    Conditioning,
    Embedder,
    Inputs,
    beside,
    drop_conditions,
    embed,
)
from ldm_jax.conditions.control import added_residuals
from ldm_jax.conditions.kinds import make_embedders
from ldm_jax.conditions.tiles import in_tiles
from ldm_jax.diffusion.cache import Cache
from ldm_jax.diffusion.editing import keep_known, noised, tiled
from ldm_jax.diffusion.guidance import (
    autoguidance,
    classifier_free,
    dynamic_threshold,
    extrapolated,
    optimally_scaled,
    projected,
    where_guided,
)
from ldm_jax.diffusion.multistep import Table
from ldm_jax.diffusion.noise import Examples, all_examples, example_keys
from ldm_jax.diffusion.objective import Objective, diffusion_loss
from ldm_jax.diffusion.parameterization import Network, Prediction, x0_coefficients
from ldm_jax.diffusion.plan import GuidanceTable, Run
from ldm_jax.diffusion.process import Diffusion
from ldm_jax.diffusion.samplers import DDIM_INVERSE, get_sampler, sample
from ldm_jax.diffusion.schedule import Level
from ldm_jax.models.attention import IMAGES
from ldm_jax.models.build import Autoencoder, make_autoencoder, tuples
from ldm_jax.models.embedders import guidance_embedding
from ldm_jax.models.low_rank import adding_factors
from ldm_jax.models.unet import UNet
from ldm_jax.pictures import to_unit

Params = dict[str, Any]


class Known(NamedTuple):
    """A picture to start from: its `latents` (B, h, w, c), and, if only a part changes, `mask`
    (B, h, w, 1): 1 where it changes, 0 where it stays; values between are blended."""

    latents: jax.Array
    mask: jax.Array | None


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
    """The static half of a model; the other half is `params`."""

    unet: UNet
    autoencoder: Autoencoder
    embedders: tuple[Embedder, ...]
    diffusion: Diffusion
    objective: Objective = Objective()

    @property
    def latent_channels(self) -> int:
        """Channels of the latents; the UNet's input may have more, from a condition."""
        return self.unet.out_channels

    @classmethod
    def from_config(
        cls, config: dict[str, Any], dtype: Any = None, remat: str = ""
    ) -> "LatentDiffusion":
        """Builds a model from the sections `unet`, `autoencoder`, `conditioning` and `diffusion`.

        The networks compute in `dtype`; None: the type of the parameters and inputs. `remat` is a
        policy of `models/remat.py` for the UNet's blocks.
        """
        autoencoder = make_autoencoder(config["autoencoder"], dtype)
        return cls(
            unet=UNet(**tuples(config["unet"]), dtype=dtype, remat=remat),
            autoencoder=autoencoder,
            embedders=make_embedders(config["conditioning"], dtype, autoencoder),
            diffusion=Diffusion.from_config(config["diffusion"]),
            objective=Objective(**config.get("objective", {})),
        )

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the networks that train: all but the first stage."""
        logvar = ("logvar",) if self.objective.learn_logvar else ()
        embedders = (embedder.name for embedder in self.embedders if embedder.network is not None)
        return ("unet", *embedders, *logvar)

    def check_weak(self, weak: "LatentDiffusion") -> None:
        """Raises ValueError for a worse model that cannot guide this one."""

        def about(model):
            tokens = tuple(getattr(e.network, "added", ()) for e in model.embedders)
            names = tuple(embedder.name for embedder in model.embedders)
            of_both = (model.latent_channels, model.diffusion.parameterization, names)
            return (*of_both, tokens) if any(tokens) else of_both

        own, other = about(self), about(weak)
        if own != other:
            raise ValueError(
                "weak: a model of other latents, parameterization or conditions cannot guide "
                f"this one: {other} there, {own} here"
            )

    def init(self, key: jax.Array, latent_shape: tuple[int, ...]) -> Params:
        """Fresh parameters of the trainable networks; `latent_shape` is (h, w, c)."""
        unet_key, embed_key = jax.random.split(key)
        params = {}
        nulls = {embedder.name: jnp.asarray(embedder.null(1)) for embedder in self.embedders}
        for i, embedder in enumerate(self.embedders):
            if embedder.network is not None and not hasattr(embedder, "residuals"):
                # −1 means "no prompt" for embedders that do not encode the empty prompt.
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
        condition = self.over(condition, jnp.zeros(1))
        x = beside(jnp.zeros((1, *latent_shape)), condition)
        variables = self.unet.init(unet_key, x, jnp.zeros(1), condition.context, y=condition.vector)
        params["unet"] = variables["params"]
        for i, embedder in enumerate(self.embedders):
            if hasattr(embedder, "residuals"):
                own = jax.random.fold_in(embed_key, i)
                params[embedder.name] = embedder.init(own, params["unet"], x, condition)
        if self.objective.learn_logvar:
            params["logvar"] = {
                "value": jnp.full(self.diffusion.schedule.timesteps, self.objective.logvar_init)
            }
        return params

    def over(self, condition: Conditioning, span: jax.Array) -> Conditioning:
        """For MeanFlow, `condition` with the times t − r (B,) as its vector, without which `output`
        is of t − r = 0. For all others, `condition`."""
        if not self.diffusion.spans:
            return condition
        if condition.vector is not None or self.unet.num_classes != "timestep":
            raise ValueError(
                "parameterization 'meanflow' has t − r in the place of the UNet's vector: use "
                "unet.num_classes='timestep', and no condition that is a vector"
            )
        return condition.replace(vector=span)

    def output(
        self, params: Params, x: jax.Array, t: jax.Array, condition: Conditioning, **options: Any
    ) -> jax.Array:
        """The UNet's output for x, to which the condition's `concat` is joined, with the residuals
        of its ControlNets and features of its T2I-Adapters. `options` are of `UNet.__call__`."""
        x = beside(x, condition)
        if condition.vector is None:
            condition = self.over(condition, jnp.zeros(len(x)))
        own = {name: options[name] for name in ("deterministic", "rngs") if name in options}
        if "deep" in options:
            own["branch"] = options["branch"]
        residuals = added_residuals(self.embedders, params, x, t, condition, **own)
        variables, context = {"params": params["unet"]}, condition.context
        if condition.images:
            places = {f"{place}/pairs": pairs for place, pairs in condition.images.items()}
            variables[IMAGES] = unflatten_dict(places, sep="/")
        more = dict(y=condition.vector, residuals=residuals, features=condition.features)
        return self.unet.apply(variables, x, t, context, **more, **options)

    @adding_factors()
    def loss(
        self,
        params: Params,
        latents: jax.Array,
        inputs: Inputs,
        key: jax.Array,
        training: bool = True,
        examples: Examples | None = None,
        times: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Per-example loss (B,) on scaled latents (B, h, w, c).

        `training` turns on the dropout of conditions and of the networks. All randomness comes from
        each example's own key, except the networks' dropout. `examples` are those of the latents in
        a larger batch; None: they are the batch. `times` (B,) replace those that the objective
        draws. `mask` (B, h, w, 1): how much of the loss counts. `params` may have factors beside
        their kernels, see `models.low_rank`.
        """
        examples = all_examples(len(latents)) if examples is None else examples
        noise_key, condition_key, dropout_key = (jax.random.fold_in(key, i) for i in range(3))
        if training:
            own = example_keys(condition_key, examples)
            inputs = drop_conditions(self.embedders, inputs, own)
            if len(latents) < examples.total:  # parts of a batch drop other features
                dropout_key = jax.random.fold_in(dropout_key, examples.index[0])
        condition = embed(self.embedders, params, inputs, dropout_key if training else None)
        rngs = {"dropout": jax.random.fold_in(dropout_key, len(self.embedders))}

        def network(x, t):
            return self.output(params, x, t, condition, deterministic=not training, rngs=rngs)

        return diffusion_loss(
            self.objective,
            self.diffusion,
            network,
            latents,
            noise_key,
            params["logvar"]["value"] if self.objective.learn_logvar else None,
            examples,
            times,
            mask,
        )

    def predict(
        self,
        params: Params,
        conditions: list[Conditioning],
        null: Conditioning,
        tile: int = 0,
        shares: jax.Array | None = None,
        cache: Cache | None = None,
        branch: int | None = None,
    ) -> Callable[..., Network]:
        """The network with guidance: `predict(guidance)(x, t)`, for any step's guidance.

        With `guidance` None only the first condition is evaluated. Projected guidance also takes
        `to_x0`: x0 is the first of the two plus the second times the output. With `tile`, latents
        with more rows or columns than this are processed in overlapping tiles. `shares` (B, K) are
        further weights of K conditions, of each picture. With `cache`, what meets the UNet's skip
        `branch` is kept.
        """

        def network(x, t, condition: Conditioning, **more):
            run = functools.partial(self.output, params)
            if cache is not None:
                run = functools.partial(run, x, t, condition, branch=branch, **more)
                return cache.reuse(len(x), run, lambda deep: run(deep=deep)[0])
            if not tile:
                return run(x, t, condition, **more)
            return in_tiles(run, x, t, condition, tile, **more)

        def under(guidance: GuidanceTable | None, to_x0: tuple = ()) -> Network:
            def plain(x, t, **more):
                return network(x, t, conditions[0], **more)

            if self.unet.time_cond_proj_dim is not None:
                # Guidance-distilled models have the scale as an input.
                scale = 1.0 if guidance is None else guidance.scale
                size = self.unet.time_cond_proj_dim

                def distilled(x, t):
                    scales = jnp.full(len(x), scale, jnp.float32)
                    return plain(x, t, timestep_cond=guidance_embedding(scales, size))

                return distilled
            if guidance is None:
                return plain
            combine = extrapolated
            if guidance.projection is not None:
                combine = projected(*to_x0, *guidance.projection)
            elif guidance.kept is not None:

                def combine(*arguments):
                    return guidance.kept * optimally_scaled(*arguments)

            weights = guidance.weights
            if shares is not None:
                weights = weights[:, None] * shares.T
            guided = classifier_free(
                *(network, conditions, null, guidance.scale, weights, guidance.rescale),
                combine,
            )
            if guidance.active is None:
                return guided
            where = where_guided if cache is None else cache.where_guided
            return where(guided, plain, guidance.active)

        return under

    def generate(
        self,
        params: Params,
        inputs: list[Inputs],
        nulls: Inputs,
        keys: jax.Array,
        run: Run,
        known: Known | None = None,
        *,
        latent_shape: tuple[int, ...],
        sampler: str = "ddim",
        latents: jax.Array | None = None,
        shares: jax.Array | None = None,
        tile: int = 0,
        weak: "tuple[LatentDiffusion, Params] | None" = None,
        branch: int = 0,
        callback: Any = None,
    ) -> jax.Array:
        """Pictures (B, H, W, C) in [0, 1]: embeds the conditions, samples and decodes.

        Args:
          inputs: one set of the embedders' inputs, or several, combined by `guidance.weights`.
          keys: (B,), the examples' own.
          run: the tables of the sampler and of guidance, from `plan`.
          known: a picture to start from, and which part of it to keep.
          latents: (B, h, w, c), unit Gaussian, in place of the starting noise drawn from `keys`.
          shares: (B, K), further weights of the K sets of `inputs`, of each picture.
          tile: latents larger than this side are processed in tiles; 0: never.
          weak: a worse model and its parameters, for the negative side of guidance (autoguidance).
          branch: of a run with a cache: see `Sampling.cache_branch`.
        """
        if tile and "refresh" in run.table:
            raise ValueError("cache_interval: a picture in tiles (tile) has no cache")
        if latents is None:
            latents = jax.vmap(lambda key: jax.random.normal(key, latent_shape))(keys)
        conditions = [embed(self.embedders, params, each) for each in inputs]
        null = embed(self.embedders, params, nulls)
        if weak is not None:
            weak_model, weak_params = weak
            weak_condition = embed(weak_model.embedders, weak_params, inputs[0])

        def denoise(
            x: jax.Array,
            level: Level,
            guidance: GuidanceTable | None = None,
            span: float = 0.0,
            cache: Cache | None = None,
        ) -> Prediction:
            diffusion, span = self.diffusion, jnp.full(len(x), span)
            a, b = x0_coefficients(diffusion.parameterization, level, diffusion.sigma_data)
            *given, without = (self.over(each, span) for each in (*conditions, null))
            predict = self.predict(params, given, without, tile, shares, cache, branch)
            network = predict(guidance if weak is None else None, (a * x, b))
            if weak is not None and guidance is not None:
                bad = self.over(weak_condition, span)
                worse = weak_model.predict(weak_params, [bad], bad, tile)(None)
                network = autoguidance(network, worse, guidance.scale)
            inner = diffusion.denoiser(network)
            if run.percentile is not None:
                inner = dynamic_threshold(inner, run.percentile)
            return inner(x, level)

        before_step = None
        if known is None:
            x = run.start.sigma * latents
        else:
            x = noised(known.latents, latents, run.start)
            if known.mask is not None:
                before_step = keep_known(*known)
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
        if known is not None and known.mask is not None:
            clean = known.mask * clean + (1.0 - known.mask) * known.latents
        return self.decode(params, clean, tile)

    def invert(self, params: Params, inputs: Inputs, latents: jax.Array, table: Table) -> jax.Array:
        """The starting noise (B, h, w, c) from which DDIM without guidance gives these latents."""
        condition = embed(self.embedders, params, inputs)
        network = self.predict(params, [condition], condition)(None)
        denoise = self.diffusion.denoiser(network)
        keys = example_keys(jax.random.key(0), len(latents))
        return sample(DDIM_INVERSE, denoise, latents, table, keys)

    def decode(self, params: Params, latents: jax.Array, tile: int = 0) -> jax.Array:
        """Scaled latents (B, h, w, c) → pictures (B, H, W, C) in [0, 1]."""

        def decode(latents):
            variables = {"params": params.get("autoencoder", {})}
            return self.autoencoder.apply(variables, latents, method=self.autoencoder.decode)

        scale = self.autoencoder.downsampling
        images = tiled(decode, latents, (tile, tile), scale=scale) if tile else decode(latents)
        return jnp.clip(to_unit(images), 0.0, 1.0)
