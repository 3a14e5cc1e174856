"""Text encoders with weighted prompts of any length, by the syntax of `prompts`.

The pieces of a prompt fill chunks of the model's text length, each with its own start and end, and
the features of all chunks are joined along the tokens. The features of a token are multiplied by
its weight, and those of a chunk then scaled so that their mean is what it was, as stable-diffusion-
webui does it. There the mean is that of all pictures drawn together, here of each picture.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ldm_jax.conditions.base import Conditioning, Embedder
from ldm_jax.conditions.pieces import stack
from ldm_jax.conditions.prompts import parse

SYNTAXES = ("plain", "a1111")
# A chunk ends at a comma among its last so many pieces, if what follows does not fit into it.
BACK_TO_COMMA = 20


class Chunks(NamedTuple):
    """`tokens` int32 (B, K, L) and their `weights` float32 (B, K, L), of K chunks."""

    tokens: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class WeightedPrompts:
    """An `Embedder` of prompts that `parse` reads, around one of plain prompts.

    The context has K·L tokens. A vector, as of SDXL's second encoder, is that of the first chunk,
    without weights.
    """

    inner: Embedder
    needs = ("caption",)
    guided = True

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def network(self) -> nn.Module:
        return self.inner.network

    @property
    def dropout(self) -> float:
        return self.inner.dropout

    def prepare(self, batch: dict[str, Any]) -> Chunks:
        """Of batch["caption"]; K is that of the longest, to which others are padded."""
        tokenizer = self.inner.tokenizer
        known = {prompt: chunked(tokenizer, prompt) for prompt in dict.fromkeys(batch["caption"])}
        count = max(len(chunks.tokens[0]) for chunks in known.values())
        rows = [self.padded(known[prompt], count) for prompt in batch["caption"]]
        return Chunks(*map(np.concatenate, zip(*rows, strict=True)))

    def padded(self, raw: Chunks, count: int) -> Chunks:
        """With chunks of no text at the end, `count` in all; no prompt stays no prompt."""
        rows, missing = len(raw.tokens), count - raw.tokens.shape[1]
        empty = np.where(raw.tokens[:, :1, :1] < 0, -1, self.inner.tokenizer([""])[None])
        more = np.repeat(empty, missing, axis=1)
        ones = np.ones((rows, missing, raw.weights.shape[2]), np.float32)
        pairs = zip(raw, (more.astype(np.int32), ones), strict=True)
        return Chunks(*(np.concatenate(pair, axis=1) for pair in pairs))

    def null(self, count: int) -> Chunks:
        """No prompt, one chunk of it."""
        tokens = self.inner.null(count)[:, None]
        return Chunks(tokens, np.ones(tokens.shape, np.float32))

    def negative(self, raw: Chunks, entries: dict[str, Any]) -> Chunks:
        """The negative prompts or, without them, no prompt."""
        return self.prepare(entries) if "caption" in entries else self.null(len(raw.tokens))

    def cut(self, batch: dict[str, Any]) -> list[str]:
        """Nothing is cut."""
        return []

    def __call__(self, params: Any, raw: Chunks, **dropout: Any) -> Conditioning:
        count, chunks, length = raw.tokens.shape
        tokens, weights = (array.reshape(-1, length) for array in raw)
        made = self.inner(params, tokens, **dropout)
        context, vector = made.context, made.vector
        if context is not None:
            context = emphasised(context, weights).reshape(count, chunks * length, -1)
        if vector is not None:
            vector = vector.reshape(count, chunks, -1)[:, 0]
        return made.replace(context=context, vector=vector)


def emphasised(features: jax.Array, weights: jax.Array) -> jax.Array:
    """Features (B, L, D) times weights (B, L), scaled to the mean of before, of each of B.

    Where all weights are 1, nothing is changed.
    """
    wide = features.astype(jnp.float32)
    weighted = wide * weights[..., None]
    mean, after = (jnp.mean(array, axis=(1, 2), keepdims=True) for array in (wide, weighted))
    changed = jnp.any(weights != 1.0, axis=1)[:, None, None] & (after != 0.0)
    scale = jnp.where(changed, mean / jnp.where(changed, after, 1.0), 1.0)
    return (weighted * scale).astype(features.dtype)


@functools.lru_cache(maxsize=256)
def chunked(tokenizer: Any, prompt: str) -> Chunks:
    """The chunks of a prompt (1, K, L).

    A chunk is full when no further piece fits into it. Then, if one of its last pieces is a comma,
    what follows that goes into the next chunk as well. The vectors of a token stay together.
    """
    start, end, padding = tokenizer.frame
    room = tokenizer.max_length - len(start) - len(end)
    texts = parse(prompt)
    ids = tokenizer.pieces([piece.text for piece in texts])
    (comma,) = tokenizer.pieces([","])
    runs = getattr(tokenizer, "runs", {})
    chunks: list[list[tuple[int, float]]] = [[]]
    last_comma = None
    for piece, own in zip(texts, ids, strict=True):
        if piece.after_break:
            chunks.append([])
            last_comma = None
        place = 0
        while place < len(own):
            run, last = own[place : place + runs.get(own[place], 1)], len(chunks[-1])
            if run == comma:
                last_comma = last
            elif last == room and last_comma is not None and last - last_comma <= BACK_TO_COMMA:
                chunks.append(chunks[-1][last_comma + 1 :])
                del chunks[-2][last_comma + 1 :]
                last_comma = None
            if len(chunks[-1]) + len(run) > room:
                chunks.append([])
                last_comma = None
            chunks[-1] += [(token, piece.weight) for token in run]
            place += len(run)
    if len(chunks) > 1 and not chunks[-1]:
        chunks.pop()
    tokens = stack(
        [[*start, *(token for token, _ in chunk), *end] for chunk in chunks],
        tokenizer.max_length,
        padding,
    )
    weights = np.ones(tokens.shape, np.float32)
    for row, chunk in zip(weights, chunks, strict=True):
        row[len(start) : len(start) + len(chunk)] = [weight for _, weight in chunk]
    return Chunks(tokens[None], weights[None])


def weighting(embedders: tuple[Embedder, ...], syntax: str) -> tuple[Embedder, ...]:
    """The embedders, whose prompts are of `syntax`, one of `SYNTAXES`.

    Raises ValueError for an unknown syntax, and for a model that takes no prompts.
    """
    if syntax not in SYNTAXES:
        raise ValueError(f"prompt_syntax={syntax!r}: choose one of {', '.join(SYNTAXES)}")
    plain = tuple(e.inner if isinstance(e, WeightedPrompts) else e for e in embedders)
    if syntax == "plain":
        return plain
    if not any("caption" in e.needs for e in plain):
        raise ValueError(f"prompt_syntax={syntax!r}: this model takes no prompts")
    return tuple(WeightedPrompts(e) if "caption" in e.needs else e for e in plain)


def of_one_length(
    embedders: tuple[Embedder, ...], inputs: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The inputs with as many chunks in all of them as in the longest."""
    weighted = [e for e in embedders if isinstance(e, WeightedPrompts)]
    counts = [each[e.name].tokens.shape[1] for each in inputs for e in weighted]
    count = max(counts, default=1)
    return [each | {e.name: e.padded(each[e.name], count) for e in weighted} for each in inputs]
