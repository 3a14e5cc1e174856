"""Gradient accumulation: a batch goes through a network in parts, in one program.

Part n of N has the rows n, n + N, n + 2N, … of the batch. So, on a mesh, each part is spread over
all devices as the batch is, and cutting moves no data.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.noise import Examples, all_examples


def check_parts(settings: Any, devices: int) -> None:
    """Checks `train.accumulate` against `train.batch_size` and a number of devices.

    Raises:
      ValueError: the batch does not divide into the parts, or a part over the devices.
    """
    parts, batch = settings.get("accumulate", 1), settings.batch_size
    if not isinstance(parts, int) or parts < 1 or batch % parts:
        raise ValueError(
            f"train.accumulate={parts} does not divide train.batch_size={batch} into equal parts"
        )
    if parts > 1 and batch // parts % devices:
        raise ValueError(
            f"train.accumulate={parts} makes parts of {batch // parts} examples, which {devices} "
            f"devices cannot share evenly: use a train.batch_size that is a multiple of "
            f"{parts * devices}"
        )


def mean_over_parts(
    function: Callable[[Any, Examples], Any], batch: dict[str, Any], parts: int
) -> Any:
    """The mean of `function(rows, examples)`, a tree of float32 arrays, over `parts` of a batch.

    `examples` are the indices of the rows in the batch. Only one part is in memory at a time.
    """
    total = len(jax.tree.leaves(batch)[0])
    if parts == 1:
        return function(batch, all_examples(total))

    def of_part(part):
        rows, index = part
        return function(rows, Examples(index, total))

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, of_part(part)), None

    split = _split((batch, jnp.arange(total)), parts)
    like = jax.eval_shape(of_part, jax.tree.map(lambda leaf: leaf[0], split))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    sums, _ = jax.lax.scan(add, zeros, split)
    return jax.tree.map(lambda leaf: leaf / parts, sums)


def in_parts(function: Callable, parts: int) -> Callable:
    """`function`, from arrays of B rows to arrays of B rows, applied to one part after the other.

    For the backward pass only its inputs are kept, and each part is computed again. So what comes
    after it may depend on the whole batch, which `mean_over_parts` does not allow.
    """
    if parts == 1:
        return function
    again = jax.checkpoint(function, prevent_cse=False)  # a scan shares nothing between its passes

    def mapped(*arrays):
        return _join(jax.lax.map(lambda rows: again(*rows), _split(arrays, parts)))

    return mapped


def _split(tree: Any, parts: int) -> Any:
    """Leaves (B, …) → (parts, B/parts, …)."""

    def split(leaf):
        return leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def _join(tree: Any) -> Any:
    """The inverse of `_split`."""
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]), tree)
