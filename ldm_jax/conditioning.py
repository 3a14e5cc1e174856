"""Conditions: raw inputs become what a UNet takes, and are dropped for classifier-free guidance.

An embedder is a network with an input of its own (tokens, later labels, pictures, …), the place
where its output goes, and the rate at which training replaces its input by the null value. Dropping
happens to the raw input, per example, so the null condition passes through the same network.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ldm_jax.models.text import TextTransformer
from ldm_jax.tokenizer import WordPiece

Inputs = dict[str, jax.Array]


@flax.struct.dataclass
class Conditioning:
    """What a UNet is told beside x and t. `context` (B, L, D) is cross-attended."""

    context: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class TextEmbedder:
    """Prompts → context, through a text transformer trained with the UNet (LDM's own choice)."""

    name: str
    network: nn.Module
    tokenizer: WordPiece
    dropout: float
    output: str = "context"

    def prepare(self, batch: dict[str, Any]) -> np.ndarray:
        """Host batch → the network's input, int32 (B, L)."""
        return self.tokenizer(batch["caption"])

    def null(self, count: int) -> np.ndarray:
        """The input that stands for no condition: the empty prompt."""
        return np.repeat(self.tokenizer([""]), count, axis=0)


def text_embedder(name: str, config: dict[str, Any], dtype: Any = None) -> TextEmbedder:
    """From the section `conditioning.<name>` of a config."""
    network = dict(config["network"])
    tokenizer = WordPiece(config["vocabulary"], network["max_length"])
    network = TextTransformer(vocab_size=tokenizer.size, dtype=dtype, **network)
    return TextEmbedder(name, network, tokenizer, config["dropout"])


EMBEDDERS = {"text": text_embedder}


def make_embedders(config: dict[str, Any], dtype: Any = None) -> tuple[TextEmbedder, ...]:
    """Every section of `config.conditioning`; its `kind` chooses the embedder.

    `dtype` is the networks' type of arithmetic.
    """
    for name, section in config.items():
        if section["kind"] not in EMBEDDERS:
            raise ValueError(
                f"conditioning.{name}.kind={section['kind']!r}: choose one of "
                f"{', '.join(EMBEDDERS)}"
            )
    return tuple(
        EMBEDDERS[section["kind"]](name, section, dtype) for name, section in config.items()
    )


def embed(
    embedders: tuple[TextEmbedder, ...],
    params: dict[str, Any],
    inputs: Inputs,
    dropout_key: jax.Array | None = None,
) -> Conditioning:
    """Runs every embedder on its input. `dropout_key` turns the networks' own dropout on."""
    outputs: dict[str, jax.Array] = {}
    for i, embedder in enumerate(embedders):
        rngs = None if dropout_key is None else {"dropout": jax.random.fold_in(dropout_key, i)}
        outputs[embedder.output] = embedder.network.apply(
            {"params": params[embedder.name]},
            inputs[embedder.name],
            deterministic=dropout_key is None,
            rngs=rngs,
        )
    return Conditioning(**outputs)


def drop_conditions(embedders: tuple[TextEmbedder, ...], inputs: Inputs, keys: jax.Array) -> Inputs:
    """Replaces each example's inputs by the null ones at each embedder's own rate.

    `keys` (B,) are the examples' own, so that who is dropped does not depend on the batch.
    """
    dropped = dict(inputs)
    for i, embedder in enumerate(embedders):
        value = inputs[embedder.name]
        uniform = jax.vmap(lambda key, i=i: jax.random.uniform(jax.random.fold_in(key, i)))(keys)
        gone = (uniform < embedder.dropout).reshape(-1, *[1] * (value.ndim - 1))
        dropped[embedder.name] = jnp.where(gone, embedder.null(1), value)
    return dropped
