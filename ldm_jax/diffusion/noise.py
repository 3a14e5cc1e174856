"""Random numbers per example, independent of the batch.

Example i of a batch uses `fold_in(key, i)`, so its numbers do not depend on how many others there
are, nor on how the batch is distributed over devices and hosts, or cut into parts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Examples(NamedTuple):
    """The examples of an array's rows: `index` (B,), int32, in a batch of `total`."""

    index: jax.Array
    total: int


def seed_bits(seed: int) -> np.uint32:
    """The part of a seed that `jax.random.key` uses, its lower 32 bits, for a compiled program."""
    return np.uint32(seed & 0xFFFFFFFF)


def all_examples(count: int) -> Examples:
    """The rows are the whole batch."""
    return Examples(jnp.arange(count), count)


def example_keys(key: jax.Array, examples: int | Examples) -> jax.Array:
    """`fold_in(key, i)` for the index i of each example; a number n is those from 0 to n − 1."""
    index = jnp.arange(examples) if isinstance(examples, int) else examples.index
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def per_example(
    draw: Callable, key: jax.Array, shape: tuple[int, ...], examples: Examples | None = None
) -> jax.Array:
    """`draw(key_i, shape[1:])` for every i of `shape[0]`, e.g. with `jax.random.normal`.

    i is the row, or its index in `examples`.
    """
    keys = example_keys(key, shape[0] if examples is None else examples)
    return jax.vmap(lambda k: draw(k, shape[1:]))(keys)
