"""Conditions: embedders of raw inputs, and dropping for classifier-free guidance.

An embedder turns its raw input (tokens, labels, sizes, pictures, …) into parts of a `Conditioning`,
and has a rate at which training replaces that input by the null value. Dropping acts on the raw
input, per example, so the null condition passes through the same network.
"""

import itertools
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Inputs = dict[str, jax.Array]


@flax.struct.dataclass
class Conditioning:
    """The UNet's inputs besides x and t: `context` (B, L, D) for cross-attention, `concat`
    (B, h, w, C) joined to x's channels, `vector`, numbers (B, D) or labels (B,), added to the time
    embedding; `control`, by the name of a ControlNet, what it makes of its hint (B, h, w, C);
    `features`, maps (B, h', w', C') for the levels of the way down, of T2I-Adapters; `images`, by
    the path of an attention, keys and values (B, N, C) of IP-Adapters."""

    context: jax.Array | None = None
    concat: jax.Array | None = None
    vector: jax.Array | None = None
    control: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    features: tuple[jax.Array, ...] = ()
    images: dict[str, tuple[tuple[jax.Array, jax.Array], ...]] = flax.struct.field(
        default_factory=dict
    )


class Embedder(Protocol):
    """`name` is its key in parameters and in the config's `conditioning`. `network` is None for an
    embedder without own parameters (an attribute `parameters` names the network that it uses
    instead). `needs` are the entries of a batch that `prepare` reads. If `guided`, the negative
    side of guidance gets its null value; if not, both sides get the same input."""

    name: str
    network: nn.Module | None
    dropout: float
    needs: tuple[str, ...]
    guided: bool

    def prepare(self, batch: dict[str, Any]) -> np.ndarray:
        """The raw input (B, …) of a host batch."""

    def null(self, count: int) -> np.ndarray:
        """The raw input (count, …) for no condition."""

    def negative(self, raw: np.ndarray, entries: dict[str, Any]) -> np.ndarray:
        """The raw input (B, …) of guidance's negative side, where the positive side gets `raw`;
        `entries` are the caller's negative entries of a batch."""

    def cut(self, batch: dict[str, Any]) -> list[str]:
        """A sentence for each text of the batch that is cut."""

    def __call__(self, params: Any, raw: jax.Array, **dropout: Any) -> Conditioning:
        """Runs the network. `dropout`: `deterministic` and `rngs`, for networks with dropout."""


def embed(
    embedders: tuple[Embedder, ...],
    params: dict[str, Any],
    inputs: Inputs,
    dropout_key: jax.Array | None = None,
) -> Conditioning:
    """Runs every embedder and joins outputs for the same field along channels; `features` add up,
    and `images` of several are all there.
    `dropout_key` turns the networks' own dropout on."""
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

    control = {name: hint for part in parts for name, hint in part.control.items()}
    features = _sums([part.features for part in parts])
    images: dict[str, tuple] = {}
    for part in parts:
        for place, pairs in part.images.items():
            images[place] = (*images.get(place, ()), *pairs)
    own = (joined(field) for field in ("context", "concat", "vector"))
    return Conditioning(*own, control, features, images)


def _sums(several: list[tuple[jax.Array, ...]]) -> tuple[jax.Array, ...]:
    """The sum of the first maps, of the second, and so on; the longest has most.

    Raises ValueError for maps of different shapes.
    """
    sums = []
    for maps in itertools.zip_longest(*several):
        maps = [one for one in maps if one is not None]
        if len(shapes := {one.shape[1:] for one in maps}) > 1:
            given = " and ".join(" × ".join(map(str, shape)) for shape in sorted(shapes))
            raise ValueError(
                f"T2I-Adapters with features of {given}: their hints must have the same size"
            )
        sums.append(sum(maps[1:], start=maps[0]))
    return tuple(sums)


def drop_conditions(embedders: tuple[Embedder, ...], inputs: Inputs, keys: jax.Array) -> Inputs:
    """Replaces each example's inputs by the null ones at each embedder's own rate.

    `keys` (B,) are the examples' own, so which examples are dropped does not depend on the batch.
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


def beside(x: jax.Array, condition: Conditioning) -> jax.Array:
    """x (B, h, w, c) and, after its channels, those of `condition.concat`, if there is one.

    Raises ValueError for a condition of another height or width, but 1 × 1.
    """
    if condition.concat is None:
        return x
    concat = condition.concat.astype(x.dtype)
    if concat.shape[1:3] not in (x.shape[1:3], (1, 1)):
        given, wanted = (" × ".join(map(str, a.shape[1:3])) for a in (concat, x))
        raise ValueError(
            f"conditions: a map of {given} latents for a picture of {wanted}: it must have the "
            "height and width of the latents"
        )
    concat = jnp.broadcast_to(concat, (*x.shape[:3], concat.shape[-1]))
    return jnp.concatenate([x, concat], axis=-1)
