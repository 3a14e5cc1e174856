"""Random numbers per example, independent of the batch.

Example i of a batch uses `fold_in(key, i)`, so its numbers do not depend on how many others there
are, nor on how the batch is distributed over devices and hosts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def example_keys(key: jax.Array, count: int) -> jax.Array:
    """`count` keys, the i-th being `fold_in(key, i)`."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))


def per_example(draw: Callable, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`draw(key_i, shape[1:])` for every i of `shape[0]`, e.g. with `jax.random.normal`."""
    return jax.vmap(lambda k: draw(k, shape[1:]))(example_keys(key, shape[0]))
