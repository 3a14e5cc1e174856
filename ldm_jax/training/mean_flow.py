"""MeanFlow training: the loss of a model with parameterization "meanflow", see
`diffusion.mean_flow`, with the conditions' dropout and the networks for guidance in its target."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.conditions.base import Embedder, Inputs, drop_conditions, embed
from ldm_jax.diffusion.mean_flow import MeanFlow, check_objective, mean_flow_loss
from ldm_jax.diffusion.noise import Examples, all_examples, example_keys
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.dot_product import forward_derivatives
from ldm_jax.models.low_rank import adding_factors
from ldm_jax.training.distillation import without_conditions

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class MeanFlowTraining:
    """The loss of `model` in training. Its `LatentDiffusion.loss` is that of the velocity alone,
    r = t, which validation measures: it does not depend on the network's own target."""

    model: LatentDiffusion
    options: MeanFlow

    @adding_factors()
    def loss(
        self,
        params: Params,
        latents: jax.Array,
        inputs: Inputs,
        key: jax.Array,
        examples: Examples | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Per-example loss (B,) on scaled latents (B, h, w, c); the arguments are those of
        `LatentDiffusion.loss`."""
        model = self.model
        examples = all_examples(len(latents)) if examples is None else examples
        noise_key, condition_key, dropout_key = (jax.random.fold_in(key, i) for i in range(3))
        own = example_keys(condition_key, examples)
        inputs = drop_conditions(model.embedders, inputs, own)
        if len(latents) < examples.total:  # parts of a batch drop other features
            dropout_key = jax.random.fold_in(dropout_key, examples.index[0])
        condition = embed(model.embedders, params, inputs, dropout_key)
        rngs = {"dropout": jax.random.fold_in(dropout_key, len(model.embedders))}

        def network(x, t, span):
            over = model.over(condition, span)
            return model.output(params, x, t, over, deterministic=False, rngs=rngs)

        def at_once(inputs):
            condition = embed(model.embedders, params, inputs)
            return lambda x, t: model.output(params, x, t, condition)

        with forward_derivatives():
            return mean_flow_loss(
                *(self.options, model.objective, model.diffusion, network, latents, noise_key),
                examples=examples,
                mask=mask,
                unconditional=at_once(without_conditions(model.embedders, inputs)),
                conditional=at_once(inputs),
                guides=_have_conditions(model.embedders, inputs, len(latents)),
            )


def _have_conditions(embedders: tuple[Embedder, ...], inputs: Inputs, count: int) -> jax.Array:
    """(B,): whether an input of guidance is not null."""
    without = without_conditions(embedders, inputs)

    def differ(a, b):
        return jnp.any((a != b).reshape(count, -1), axis=1)

    leaves = jax.tree.leaves(jax.tree.map(differ, inputs, without))
    return jnp.any(jnp.stack(leaves), axis=0) if leaves else jnp.zeros(count, bool)


def read_options(config: Any, model: LatentDiffusion) -> MeanFlow | None:
    """The section `mean_flow` of a config, {} for none, of a MeanFlow model; None of other models.

    Raises ValueError for a section that the model does not use, an option that does not exist or is
    out of range, guidance of a model without, and an objective that MeanFlow does not use.
    """
    section = dict(config.get("mean_flow") or {})
    if not model.diffusion.spans:
        if section:
            raise ValueError(
                "mean_flow: for models with diffusion.parameterization='meanflow'; this one has "
                f"{model.diffusion.parameterization!r}"
            )
        return None
    known = [field.name for field in dataclasses.fields(MeanFlow)]
    if unknown := sorted(section.keys() - set(known)):
        raise ValueError(f"mean_flow has no option {unknown[0]!r}; it has {', '.join(known)}")
    options = MeanFlow(**section)
    check_objective(model.objective)
    if options.guided and not any(e.guided and e.dropout for e in model.embedders):
        raise ValueError(
            "mean_flow: guidance needs predictions without conditions, and no condition is "
            "dropped in training: set a dropout, or omega=1 and kappa=0"
        )
    return options
