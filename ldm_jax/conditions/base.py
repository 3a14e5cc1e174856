"""Conditions: raw inputs become what a UNet takes, and are dropped for classifier-free guidance.

An embedder turns an input of its own (tokens, labels, sizes, pictures, …) into parts of a
`Conditioning`, and says at what rate training replaces that input by the null value. Dropping
happens to the raw input, per example, so the null condition passes through the same network.
"""

from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Inputs = dict[str, jax.Array]


@flax.struct.dataclass
class Conditioning:
    """What a UNet is told beside x and t: `context` (B, L, D) is cross-attended, `concat`
    (B, h, w, C) stands beside x, `vector`, numbers (B, D) or labels (B,), beside the time."""

    context: jax.Array | None = None
    concat: jax.Array | None = None
    vector: jax.Array | None = None


class Embedder(Protocol):
    """`name` is its key in parameters and in the config's `conditioning`; `network` is None for
    what has no parameters of its own (an attribute `parameters` names the network whose it takes);
    `needs` are the entries of a batch that `prepare` reads. `guided` says whether guidance leads
    away from its null value, or both sides of guidance get the same."""

    name: str
    network: nn.Module | None
    dropout: float
    needs: tuple[str, ...]
    guided: bool

    def prepare(self, batch: dict[str, Any]) -> np.ndarray:
        """The raw input (B, …) of a host batch."""

    def null(self, count: int) -> np.ndarray:
        """The raw input (count, …) that stands for no condition."""

    def negative(self, raw: np.ndarray, entries: dict[str, Any]) -> np.ndarray:
        """What guidance leads away from where a picture gets `raw`, (B, …); `entries` are those of
        a batch that the caller wants to lead away from."""

    def cut(self, batch: dict[str, Any]) -> list[str]:
        """What of the batch's texts is lost, in sentences."""

    def __call__(self, params: Any, raw: jax.Array, **dropout: Any) -> Conditioning:
        """Runs the network. `dropout`: `deterministic` and `rngs` of networks that have some."""


def embed(
    embedders: tuple[Embedder, ...],
    params: dict[str, Any],
    inputs: Inputs,
    dropout_key: jax.Array | None = None,
) -> Conditioning:
    """Runs every embedder; what goes to the same place is joined along channels. `dropout_key`
    turns the networks' own dropout on."""
    parts = []
    for i, embedder in enumerate(embedders):
        rngs = None if dropout_key is None else {"dropout": jax.random.fold_in(dropout_key, i)}
        parts.append(
            embedder(
                params.get(getattr(embedder, "parameters", embedder.name)),
                inputs[embedder.name],
                deterministic=dropout_key is None,
                rngs=rngs,
            )
        )

    def joined(field: str) -> jax.Array | None:
        values = [v for part in parts if (v := getattr(part, field)) is not None]
        return jnp.concatenate(values, axis=-1) if len(values) > 1 else next(iter(values), None)

    return Conditioning(joined("context"), joined("concat"), joined("vector"))


def drop_conditions(embedders: tuple[Embedder, ...], inputs: Inputs, keys: jax.Array) -> Inputs:
    """Replaces each example's inputs by the null ones at each embedder's own rate.

    `keys` (B,) are the examples' own, so that who is dropped does not depend on the batch.
    """
    dropped = dict(inputs)
    for i, embedder in enumerate(embedders):
        if not embedder.dropout:
            continue
        value = inputs[embedder.name]
        uniform = jax.vmap(lambda key, i=i: jax.random.uniform(jax.random.fold_in(key, i)))(keys)
        gone = uniform < embedder.dropout
        dropped[embedder.name] = jax.tree.map(
            lambda v, null, gone=gone: jnp.where(gone.reshape(-1, *[1] * (v.ndim - 1)), null, v),
            value,
            embedder.null(1),
        )
    return dropped
