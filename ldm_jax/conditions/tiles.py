"""A network on latents that are larger than a tile, with conditions that are maps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditions.base import Conditioning, beside
from ldm_jax.diffusion.editing import tiled


def in_tiles(
    network: Callable[..., jax.Array],
    x: jax.Array,
    t: jax.Array,
    condition: Conditioning,
    tile: int,
    **more: Any,
) -> jax.Array:
    """`network(x, t, condition, **more)` in overlapping tiles of this side; maps are cut with x.

    Raises ValueError for a condition that is of the whole picture.
    """
    if condition.features:
        raise ValueError(
            "tile: a T2I-Adapter's features are of the whole picture, so it is drawn whole"
        )
    maps = (beside(x, condition), condition.control)
    leaves, structure = jax.tree.flatten(maps)
    ends = np.cumsum([leaf.shape[-1] for leaf in leaves])[:-1]
    rest = condition.replace(concat=None, control={})

    def parts(joined):
        def repeat(v):
            return jnp.tile(v, (len(joined) // len(t), *[1] * (v.ndim - 1)))

        x, control = structure.unflatten(jnp.split(joined, ends, axis=-1))
        given, options = jax.tree.map(repeat, (rest, more))
        return network(x, repeat(t), given.replace(control=control), **options)

    return tiled(parts, jnp.concatenate(leaves, axis=-1), (tile, tile))
