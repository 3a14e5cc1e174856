"""Optimisers from a configuration: learning-rate schedules, and rules for parameters by name."""

import re
from typing import Any

import jax
import optax


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
    """A tree path as users write it: "unet/conv_in/kernel"."""
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


def make_optimizer(
    config: Any, steps: int, networks: tuple[str, ...]
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019) for each network of its own.

    Moments and clipping (`config.clip`, global norm, 0 for none) are per network, so that the
    discriminator's never touch the autoencoder's. `config.multipliers`: pairs (regex, factor) on
    paths such as "unet/conv_in/kernel" scale the learning rate, 0 freezes.
    """
    adam = optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.adamw(
            learning_rate(config, steps), config.b1, config.b2, weight_decay=config.weight_decay
        ),
    )
    return optax.chain(
        optax.partition(
            {name: adam for name in networks}, lambda params: {name: name for name in params}
        ),
        scale_by_rules(tuple(config.multipliers)),
    )
