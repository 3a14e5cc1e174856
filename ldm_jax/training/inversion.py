"""Textual inversion: the vectors of a new token train, and nothing else (Gal et al. 2022).

The section `inversion` of a config chooses the token. Its vectors are parameters of their own, at
"text/token_embedding/added_0" beside "text/token_embedding/embedding": what trains, is averaged and
is in checkpoints. The model's own are arguments of a step, without a gradient.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditions.tokenizer import make_tokenizer
from ldm_jax.data.transforms import Example
from ldm_jax.interop.adapted import about_base
from ldm_jax.interop.embeddings import FILE, table_of, with_token, write_embedding
from ldm_jax.interop.networks import texts
from ldm_jax.models.tokens import ADDED
from ldm_jax.training.sections import read_section
from ldm_jax.training.trainable import merge

Params = dict[str, Any]
CHECKED = 1000  # captions that are searched for the token


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `inversion`.

    Attributes:
      token: the new word, such as "<mine>".
      vectors: how many vectors it stands for.
      start: words of the model, whose vectors the new ones are at first, in turn.
      captions: of the pictures, with "{}" for the token, at random; empty: the pictures' own, which
        then must contain it.
    """

    token: str = ""
    vectors: int = 1
    start: str = ""
    captions: tuple[str, ...] = ("a picture of {}",)


@dataclasses.dataclass(frozen=True)
class Inversion:
    """The vectors of a run. Has the interface of `adapters.Adapters`.

    `places` are (text encoder, table, leaf) of the vectors. `file` is what `write` is given.
    """

    options: Options
    places: tuple[tuple[str, str, str], ...]
    base: dict[str, Any]
    file: str = FILE

    @property
    def networks(self) -> tuple[str, ...]:
        return tuple(encoder for encoder, _, _ in self.places)

    def init(self, key: jax.Array, frozen: Params, loaded: Params) -> Params:
        """The vectors of the first words, `loaded`."""
        del key, frozen
        return jax.tree.map(jnp.asarray, loaded)

    def scales(self) -> Params:
        """None: the vectors are what they are."""
        return {}

    def write(self, path: str | os.PathLike, vectors: Params, config: dict[str, Any]) -> None:
        """Writes the vectors as diffusers does, and, in a folder beside that file, as AUTOMATIC1111
        does."""
        del config
        token, path = self.options.token, Path(path)
        rows = {
            encoder: np.asarray(vectors[encoder][table][leaf])
            for encoder, table, leaf in self.places
        }
        write_embedding(path, token, rows)
        beside = path.parent / "a1111"
        beside.mkdir(exist_ok=True)
        write_embedding(beside / f"{token.strip('<>')}.safetensors", token, rows, "a1111")


class Captions:
    """(example, rng) → its caption, one of several with a token. A class, so that it can be sent
    to the processes that read data."""

    entries = ("caption",)

    def __init__(self, options: Options):
        self.texts = tuple(text.replace("{}", options.token) for text in options.captions)

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        return {"caption": self.texts[rng.integers(len(self.texts))]}


def read_options(config: Any) -> Options | None:
    """The checked section `inversion` of a config; None if there is none.

    Raises ValueError for a value that is not allowed, and beside settings that it excludes.
    """
    options = read_section(config, "inversion", Options)
    if options is None:
        return None
    if config.get("adapters"):
        raise ValueError("inversion and adapters are two trainings: remove one of the two sections")
    if config.get("prior") and config.prior.prompt:
        raise ValueError("inversion changes no other word, and needs no prior.prompt: remove it")
    count = options.vectors
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"inversion.vectors={count}: choose a whole number above 0")
    if "/" in options.token or not options.token.strip("<>"):
        raise ValueError(f"inversion.token={options.token!r}: choose a word, such as '<mine>'")
    without = [text for text in options.captions if "{}" not in text]
    if without:
        raise ValueError(f"inversion.captions: {without[0]!r} has no {{}} for the token")
    return options


def with_new_token(resolved: dict[str, Any], options: Options) -> dict[str, Any]:
    """The config of a model with the token in each of its text encoders.

    Raises ValueError for a model without prompts, and for a token that exists already.
    """
    encoders = texts(resolved)
    if not encoders:
        raise ValueError("inversion is of models that take prompts; this one takes none")
    try:
        return with_token(resolved, options.token, dict.fromkeys(encoders, options.vectors))
    except ValueError as error:
        raise ValueError(f"inversion.token: {error}") from None


def make_inversion(
    options: Options, params: Params, config: dict[str, Any], start: str, autoencoder: str
) -> tuple[Inversion, Params, Params]:
    """(inversion, parameters that do not train, initial values of those that do).

    The former have the first vectors as well: so they are the model before the training.

    Args:
      params: of the loaded model.
      config: of its networks, with the token.
      start, autoencoder: the paths `init_from` and `first_stage`.

    Raises ValueError for a `start` without words that the model knows.
    """
    places, loaded = [], {}
    for encoder, section in texts(config).items():
        tokenizer = make_tokenizer(section, section["network"].get("max_length", 77))
        (ids,) = tokenizer.pieces([options.start])
        if not ids or tokenizer.unknown(options.start):
            raise ValueError(
                f"inversion.start={options.start!r}: name words that the model knows, near to what "
                "the pictures show"
            )
        place = table_of(params[encoder])
        table = np.asarray(params[encoder][place]["embedding"])
        rows = table[np.resize(ids, options.vectors)] if max(ids) < len(table) else None
        if rows is None:
            raise ValueError(f"inversion.start={options.start!r}: name words, not an added token")
        leaf = f"{ADDED}{len(section['tokens']) - 1}"
        places.append((encoder, place, leaf))
        loaded[encoder] = {place: {leaf: rows.astype(np.float32)}}
    tables = [f"{encoder}/{table}/embedding" for encoder, table, _ in places]
    base = about_base(start, autoencoder, params, tables)
    return Inversion(options, tuple(places), base), merge(params, loaded), loaded


def captions(options: Options, source: Any) -> tuple[Captions, ...]:
    """What gives the pictures of a source their captions; nothing where they have their own.

    Raises ValueError if none of these contains the token.
    """
    if options.captions:
        return (Captions(options),)
    some = (source.describe(i)["caption"] for i in range(min(len(source), CHECKED)))
    if not any(options.token.lower() in caption.lower() for caption in some):
        raise ValueError(
            f"no caption contains {options.token!r}: write it into them, or give captions with "
            "inversion.captions"
        )
    return ()
