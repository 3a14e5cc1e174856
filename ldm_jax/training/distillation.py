"""Distillation: a student learns from the model that training starts from, with guidance.

The section `distill` of a config chooses how. The student is a copy of the teacher's UNet; with the
section `adapters` beside it, factors of a LoRA beside the teacher's (LCM-LoRA, Luo et al. 2023b).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditions.base import Embedder, Inputs, embed
from ldm_jax.diffusion.distillation import consistency_loss, guidance_loss
from ldm_jax.diffusion.guidance import classifier_free
from ldm_jax.diffusion.noise import Examples, all_examples, per_example
from ldm_jax.interop.changes import separated
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.embedders import guidance_embedding
from ldm_jax.models.low_rank import adding_factors
from ldm_jax.training.sections import read_section

Params = dict[str, Any]
KINDS = ("consistency", "guidance")
TEACHER = "teacher"  # the name of its UNet's parameters, beside those of the student
STUDENT = ("^unet/",)  # what trains
GUIDED = "time_embed_cond_proj"  # the layer of a UNet that takes the embedded scale


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `distill`.

    Attributes:
      kind: "consistency", for a few steps of the sampler lcm, or "guidance", for one evaluation in
        place of two: see `diffusion.distillation`.
      guidance: the range of the scales that are learned.
      dim: of the embedding of the scale, an input of the student; 0: it has none, and has learned
        all scales of the range at once.
      delta: of the distance of consistency.
    """

    kind: str = "consistency"
    guidance: tuple[float, float] = (3.0, 13.0)
    dim: int = 256
    delta: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The loss of a student: `loss` has the arguments of `LatentDiffusion.loss`."""

    student: LatentDiffusion
    options: Options

    @adding_factors()
    def loss(
        self,
        params: Params,
        latents: jax.Array,
        inputs: dict[str, Any],
        key: jax.Array,
        training: bool = True,
        examples: Examples | None = None,
        times: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Per-example loss (B,) of the student on scaled latents (B, h, w, c), at a random scale of
        guidance for each example. `params` hold the teacher's UNet as `TEACHER`, or, with factors
        beside kernels, it is the UNet without them. No condition is dropped."""
        del training  # a teacher has no dropout of its networks either
        student, options = self.student, self.options
        examples = all_examples(len(latents)) if examples is None else examples
        own, rest = (jax.random.fold_in(key, i) for i in range(2))
        low, high = options.guidance
        scales = per_example(jax.random.uniform, own, (len(latents),), examples)
        scales = low + (high - low) * scales
        condition = embed(student.embedders, params, inputs)
        null = embed(student.embedders, params, without_conditions(student.embedders, inputs))

        unguided = dataclasses.replace(student.unet, time_cond_proj_dim=None)
        teacher = dataclasses.replace(student, unet=unguided)
        given = params[TEACHER] if TEACHER in params else separated(params)[0]["unet"]
        given = jax.lax.stop_gradient(params | {"unet": given})

        def plain(x, t, condition):
            return teacher.output(given, x, t, condition)

        guided = classifier_free(plain, [condition], null, 1.0, scales[None])
        dim = student.unet.time_cond_proj_dim
        told = {} if dim is None else {"timestep_cond": guidance_embedding(scales, dim)}

        def network(x, t):
            return student.output(params, x, t, condition, **told)

        arguments = (student.diffusion, network, guided, latents, rest, examples, times, mask)
        if options.kind == "guidance":
            return guidance_loss(student.objective, *arguments)
        return consistency_loss(*arguments, options.delta)


def without_conditions(embedders: tuple[Embedder, ...], inputs: Inputs) -> Inputs:
    """The inputs of guidance's negative side: null, but for embedders that are not guided."""
    return {
        e.name: _repeated(e.null(1), inputs[e.name]) if e.guided else inputs[e.name]
        for e in embedders
    }


def _repeated(null: Any, like: Any) -> Any:
    return jax.tree.map(lambda v, x: jnp.broadcast_to(v, (len(x), *v.shape[1:])), null, like)


def read_options(config: Any) -> Options | None:
    """The checked section `distill` of a config; None if there is none.

    Raises ValueError for a value that is not allowed, and beside settings that it excludes.
    """
    options = read_section(config, "distill", Options)
    if options is None:
        return None
    for other in ("inversion", "control"):
        if config.get(other):
            raise ValueError(f"distill and {other} are two trainings: remove one of the sections")
    if config.get("prior") and config.prior.prompt:
        raise ValueError("distill learns from the model itself: remove prior.prompt")
    if options.kind not in KINDS:
        raise ValueError(f"distill.kind={options.kind!r}: choose one of {', '.join(KINDS)}")
    low, high = (*options.guidance, 0.0, 0.0)[:2]
    if len(options.guidance) != 2 or not 0.0 <= low <= high < np.inf:
        raise ValueError(
            f"distill.guidance={tuple(options.guidance)}: give the least and the greatest scale"
        )
    if options.dim < 0 or options.delta <= 0.0:
        raise ValueError("distill: dim must be at least 0, and delta above 0")
    if options.dim and config.get("adapters"):
        raise ValueError("distill.dim: factors of a LoRA have no input for the scale: use dim=0")
    return options


def student_config(resolved: dict[str, Any], options: Options) -> dict[str, Any]:
    """The config of the student of a model.

    Raises ValueError for a model that is a student itself, or knows no unconditional prediction.
    """
    if resolved["unet"].get("time_cond_proj_dim"):
        raise ValueError("distill: the model of init_from was distilled already")
    if not any(section.get("dropout") for section in resolved["conditioning"].values()):
        raise ValueError(
            "distill: the model of init_from dropped no condition in training, so it has no "
            "guidance to learn"
        )
    unet, diffusion = dict(resolved["unet"]), dict(resolved["diffusion"])
    if diffusion["parameterization"] == "meanflow":
        raise ValueError("distill: the model of init_from is a MeanFlow, which draws in one step")
    if options.dim:
        unet["time_cond_proj_dim"] = options.dim
    if options.kind == "consistency":
        if not diffusion["schedule"].get("timesteps") or diffusion["parameterization"] == "edm":
            raise ValueError(
                "distill.kind='consistency' is for models of a table of timesteps; this one has "
                f"the schedule {diffusion['schedule']['name']!r}"
            )
        diffusion["spacing"] = "lcm"
    return resolved | {"unet": unet, "diffusion": diffusion}


def as_teacher(loaded: Params, fresh: Params) -> Params:
    """The loaded parameters, with those 0 that the teacher's UNet lacks: so the student begins as
    the teacher without guidance. `fresh` are shapes of all."""
    more = {
        name: jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), leaves)
        for name, leaves in fresh["unet"].items()
        if name == GUIDED
    }
    return loaded | {"unet": loaded["unet"] | more}
