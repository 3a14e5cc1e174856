"""Optimisers from a configuration: learning-rate schedules, and rules for parameters by name."""

import re
from typing import Any

import jax
import optax

from ldm_jax.training.muon import scale_by_muon


def learning_rate(config: Any, steps: int) -> optax.Schedule:
    """Linear warm-up over `config.warmup` steps to `config.lr`, then `config.schedule`.

    "constant" stays there (LDM, Stable Diffusion); "cosine" falls to `config.lr_end`·lr at `steps`.
    """
    left = max(steps - config.warmup, 1)
    schedules = {
        "constant": optax.constant_schedule(config.lr),
        "cosine": optax.cosine_decay_schedule(config.lr, left, config.lr_end),
    }
    if config.schedule not in schedules:
        raise ValueError(
            f"optimizer.schedule={config.schedule!r}: choose one of {', '.join(schedules)}"
        )
    warmup = optax.linear_schedule(config.lr / (config.warmup + 1), config.lr, config.warmup)
    return optax.join_schedules([warmup, schedules[config.schedule]], [config.warmup])


def parameter_path(path: tuple) -> str:
    """A tree path as in configs: "unet/input_blocks_0_0/kernel"."""
    return "/".join(str(getattr(entry, "key", entry)) for entry in path)


def scale_by_rules(rules: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Multiplies each update by the factor of the first rule whose regex its path matches."""

    def factor(path):
        name = parameter_path(path)
        return next((scale for regex, scale in rules if re.search(regex, name)), 1.0)

    def update(updates, params):
        del params
        return jax.tree_util.tree_map_with_path(lambda path, u: u * factor(path), updates)

    return optax.stateless(update)


MOMENTS = ("float32", "bfloat16")


def precondition(config: Any) -> optax.GradientTransformation:
    """The direction of a step: "adamw", or "muon" for kernels and Adam for all the rest.

    `config.moments` is the type in which first moments are kept. Adam's second moments stay
    float32: bfloat16 has steps of 0.4 %, and b2 = 0.999 changes them by less, so they would never
    fall.
    """
    moments = config.get("moments", "float32")
    if moments not in MOMENTS:
        raise ValueError(f"optimizer.moments={moments!r}: choose one of {', '.join(MOMENTS)}")
    adam = optax.scale_by_adam(config.b1, config.b2, mu_dtype=moments)
    if config.name == "adamw":
        return adam
    if config.name != "muon":
        raise ValueError(f"optimizer.name={config.name!r}: choose adamw or muon")

    def kind(path, value):
        return "kernel" if parameter_path(path).endswith("kernel") and value.ndim > 1 else "other"

    return optax.partition(
        {"kernel": scale_by_muon(moments=moments), "other": adam},
        lambda params: jax.tree_util.tree_map_with_path(kind, params),
    )


def make_optimizer(
    config: Any, steps: int, networks: tuple[str, ...]
) -> optax.GradientTransformation:
    """Adam or Muon with decoupled weight decay (Loshchilov & Hutter 2019), for each network.

    `config.name` is "adamw" or "muon" (see `scale_by_muon`); raises ValueError for another.
    Moments and clipping (`config.clip`, global norm, 0 for none) are per network, so that the
    discriminator's never affect the autoencoder's. `config.multipliers`: pairs (regex, factor) on
    paths such as "unet/input_blocks_0_0/kernel" scale the learning rate; 0 freezes.
    """
    of_one = optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        precondition(config),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )
    return optax.chain(
        optax.partition(
            {name: of_one for name in networks}, lambda params: {name: name for name in params}
        ),
        scale_by_rules(tuple(config.multipliers)),
    )
