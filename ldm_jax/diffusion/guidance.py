"""Guidance: how two opinions of a network become one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Network = Callable[[jax.Array, jax.Array], jax.Array]


def classifier_free(network: Callable, condition, null, scale: jax.Array) -> Network:
    """uncond + scale·(cond − uncond) in one doubled batch (Ho & Salimans 2022; LDM's convention).

    `network(x, t, condition)`; `condition` and `null` are pytrees with a leading batch dimension,
    doubled here as [null, condition]. Scale 1 is the plain conditional model, 0 the unconditional
    one. Works on any parameterisation, for all are affine in x with the same coefficients.
    """
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), null, condition)

    def guided(x, t):
        output = network(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        uncond, cond = jnp.split(output, 2)
        return uncond + scale * (cond - uncond)

    return guided
