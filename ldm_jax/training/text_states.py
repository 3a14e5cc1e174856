"""Features of frozen text encoders: computed in every step, once for each caption, or read."""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np

from ldm_jax.conditions.base import Conditioning, Embedder
from ldm_jax.data.latent_shards import States
from ldm_jax.runtime.mesh import on_one_device
from ldm_jax.training.abstract import zeros_if_abstract
from ldm_jax.training.latents import fingerprint
from ldm_jax.training.state import Params

TEXT_STATES = ("step", "memory", "shards")
BATCH = 32  # captions that are encoded together
OF_CAPTIONS = ("tags", "captions", "drop_tags", "shuffle_tags")  # augmentations that change them
FIELDS = ("context", "vector")  # of a text encoder's `Conditioning`


class CachedStates:
    """An `Embedder` in place of a text embedder whose network does not train.

    A caption is encoded at its first use and kept on the host, context and vector in the type of
    the encoder's arithmetic: 240 kB each for Stable Diffusion 1 in float32. The raw input is the
    `Conditioning` itself. The fields that are `stored` come with the batch, as NAME/FIELD.
    """

    network, guided = None, True

    def __init__(self, embedder: Embedder, params: Any, stored: Collection[str] = ()):
        self.name, self.dropout = embedder.name, embedder.dropout
        self._stored = {field: f"{embedder.name}/{field}" for field in stored}
        self.needs = ("caption", *self._stored.values())
        self._embedder, self._params, self._kept = embedder, params, {}
        self._encode = zeros_if_abstract(
            jax.jit(lambda params, raw: embedder(params, raw, deterministic=True))
        )
        self._null = self._encoded(embedder.null(1))

    def prepare(self, batch: dict[str, Any]) -> Conditioning:
        """The features (B, …) of batch["caption"]."""
        if self._stored:
            return Conditioning(**{field: batch[entry] for field, entry in self._stored.items()})
        captions = list(batch["caption"])
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._kept]
        self._kept |= zip(new, self.encoded(new), strict=True)
        return jax.tree.map(lambda *states: np.stack(states), *(self._kept[c] for c in captions))

    def encoded(self, captions: Sequence[str]) -> list[Conditioning]:
        """The features of each caption, without a dimension for the batch."""
        found = []
        for start in range(0, len(captions), BATCH):
            part = list(captions[start : start + BATCH])
            raw = self._embedder.prepare({"caption": part + [""] * (BATCH - len(part))})
            states = self._encoded(raw)
            found += [
                jax.tree.map(lambda state, i=i: state[i].copy(), states) for i in range(len(part))
            ]
        return found

    def _encoded(self, raw: Any) -> Conditioning:
        with on_one_device():  # another process has other captions
            return jax.device_get(self._encode(self._params, raw))

    def null(self, count: int) -> Conditioning:
        """The empty caption's."""
        return jax.tree.map(lambda state: np.repeat(state, count, axis=0), self._null)

    def __call__(self, params: Any, raw: Conditioning, **_: Any) -> Conditioning:
        return raw


def with_states(
    embedders: tuple[Embedder, ...],
    how: str,
    frozen: Params,
    trains: Collection[str],
    stored: States | None = None,
) -> tuple[Embedder, ...]:
    """The embedders of training: with `how` "memory", frozen text encoders' features are kept; with
    "shards", those in `stored` are read.

    `trains` are the names of the networks of which any parameter trains.

    Raises:
      ValueError: an unknown `how`, no text encoder is frozen, or one has no states in `stored`.
    """
    if how not in TEXT_STATES:
        raise ValueError(f"text_states={how!r}: choose one of {', '.join(TEXT_STATES)}")
    if how == "step":
        return embedders
    still = frozen_texts(embedders, trains)
    if not still:
        raise ValueError(f"text_states={how!r} keeps features of frozen encoders; none is frozen")
    fields = {name: () for name in still} if how == "memory" else stored or {}
    lacking = [name for name in still if name not in fields]
    if lacking:
        raise ValueError(
            f"text_states='shards': config.cache has no states of conditioning.{lacking[0]}, only "
            f"of {', '.join(fields) or 'none'}; use text_states='step' or 'memory'"
        )
    return tuple(
        CachedStates(e, frozen[e.name], tuple(fields[e.name])) if e.name in still else e
        for e in embedders
    )


def frozen_texts(embedders: Sequence[Embedder], trains: Collection[str]) -> tuple[str, ...]:
    """The names of the text encoders of which no parameter trains."""
    return tuple(e.name for e in embedders if "caption" in e.needs and e.name not in trains)


def text_fingerprint(section: dict[str, Any], params: Any, precision: str) -> str:
    """Of all that decides the states of a caption: section, parameters and arithmetic.

    Not the path of a vocabulary, which may lie elsewhere.
    """
    about = {k: v for k, v in section.items() if k not in ("dropout", "vocabulary")}
    return fingerprint(about | {"precision": precision}, params)


def check_states(config: Any, source: Any, sections: dict[str, Any], frozen: Params) -> States:
    """What the source of `config.cache` has of states, for `text_states="shards"`.

    Args:
      sections: the resolved section `conditioning`.

    Raises:
      ValueError: it has none, or of another text encoder; or captions change.
    """
    if config.latents != "shards":
        raise ValueError("text_states='shards' needs latents='shards', which are read together")
    changed = [name for name in config.data.augment if name.partition(":")[0] in OF_CAPTIONS]
    if changed:
        raise ValueError(
            f"data.augment: {changed[0]} changes captions, whose states are stored; use "
            "text_states='step'"
        )
    if not source.states:
        raise ValueError(
            f"text_states='shards': {config.cache} has no states of captions; use 'step' or "
            "'memory', or store them with python -m ldm_jax.cache"
        )
    precision = config.get("precision", "float32")
    for name, there in source.options["texts"].items():
        own = name in sections and name in frozen
        if own and there != text_fingerprint(sections[name], frozen[name], precision):
            raise ValueError(
                f"{config.cache} has states of another text encoder than conditioning.{name}, or "
                f"not of precision={precision!r}: make another cache, or use text_states='step'"
            )
    return source.states
