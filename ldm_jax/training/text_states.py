"""Features of frozen text encoders: computed in every step, or once for each caption."""

from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from ldm_jax.conditions.base import Conditioning, Embedder
from ldm_jax.runtime.mesh import on_one_device
from ldm_jax.training.abstract import zeros_if_abstract
from ldm_jax.training.state import Params

TEXT_STATES = ("step", "memory")
BATCH = 32  # captions that are encoded together


class CachedStates:
    """An `Embedder` in place of a text embedder whose network does not train.

    A caption is encoded at its first use and kept on the host, context and vector in the type of
    the encoder's arithmetic: 240 kB each for Stable Diffusion 1 in float32. The raw input is the
    `Conditioning` itself.
    """

    network, needs, guided = None, ("caption",), True

    def __init__(self, embedder: Embedder, params: Any):
        self.name, self.dropout = embedder.name, embedder.dropout
        self._embedder, self._params, self._kept = embedder, params, {}
        self._encode = zeros_if_abstract(
            jax.jit(lambda params, raw: embedder(params, raw, deterministic=True))
        )
        self._null = self._encoded(embedder.null(1))

    def prepare(self, batch: dict[str, Any]) -> Conditioning:
        """The features (B, …) of batch["caption"]."""
        captions = list(batch["caption"])
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._kept]
        for start in range(0, len(new), BATCH):
            part = new[start : start + BATCH]
            raw = self._embedder.prepare({"caption": part + [""] * (BATCH - len(part))})
            states = self._encoded(raw)
            for i, caption in enumerate(part):
                self._kept[caption] = jax.tree.map(lambda state, i=i: state[i].copy(), states)
        return jax.tree.map(lambda *states: np.stack(states), *(self._kept[c] for c in captions))

    def _encoded(self, raw: Any) -> Conditioning:
        with on_one_device():  # another process has other captions
            return jax.device_get(self._encode(self._params, raw))

    def null(self, count: int) -> Conditioning:
        """The empty caption's."""
        return jax.tree.map(lambda state: np.repeat(state, count, axis=0), self._null)

    def __call__(self, params: Any, raw: Conditioning, **_: Any) -> Conditioning:
        return raw


def with_states(
    embedders: tuple[Embedder, ...], how: str, frozen: Params, trains: Collection[str]
) -> tuple[Embedder, ...]:
    """The embedders of training: with `how` "memory", frozen text encoders' features are kept.

    `trains` are the names of the networks of which any parameter trains.

    Raises:
      ValueError: an unknown `how`, or no text encoder is frozen.
    """
    if how not in TEXT_STATES:
        raise ValueError(f"text_states={how!r}: choose one of {', '.join(TEXT_STATES)}")
    if how == "step":
        return embedders
    still = [e.name for e in embedders if "caption" in e.needs and e.name not in trains]
    if not still:
        raise ValueError("text_states='memory' keeps features of frozen encoders; none is frozen")
    return tuple(CachedStates(e, frozen[e.name]) if e.name in still else e for e in embedders)
