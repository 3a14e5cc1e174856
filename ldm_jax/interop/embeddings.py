"""Files of textual inversions: vectors of new tokens, in diffusers' and in AUTOMATIC1111's formats.

- diffusers' `learned_embeds.safetensors` or `.bin`: {token: (n, width) or (width,)};
- AUTOMATIC1111's `NAME.safetensors`: {"emb_params": (n, width)}, and `NAME.pt`, which torch wrote:
  {"string_to_param": {"*": (n, width)}, …}; the token is the name of the file;
- of SDXL, both: {"clip_l": (n, 768), "clip_g": (n, 1280)}, for its two text encoders.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.conditions.tokenizer import make_tokenizer
from ldm_jax.interop.files import Tensors, open_state, write_safetensors
from ldm_jax.interop.networks import texts
from ldm_jax.models.tokens import ADDED
from ldm_jax.version import __version__

FILE = "learned_embeds.safetensors"  # in a workdir, and as diffusers calls it
LAYOUTS = ("diffusers", "a1111")
BOTH = ("clip_l", "clip_g")  # of the first and of the second text encoder
NAMELESS = ("emb_params", "*")
TABLES = ("token_embedding", "token_emb")  # of CLIP, and of our own transformer
FAMILIES = {
    768: "Stable Diffusion 1",
    1024: "Stable Diffusion 2",
    1280: "SDXL's second text encoder",
}


class Embedding(NamedTuple):
    """A token, and its vectors (n, width), float32, by the name of the text encoder."""

    token: str
    vectors: dict[str, np.ndarray]


def read_embeddings(
    path: str | os.PathLike, config: dict[str, Any], token: str = ""
) -> list[Embedding]:
    """The tokens in a file, or in a run's workdir, for the model of `config`.

    Args:
      token: a name in place of the file's own; for files of one token.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file holds no embedding, one of another model, or numbers that are not finite;
        or several tokens where `token` names one.
    """
    path = Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    widths = {name: section["network"]["width"] for name, section in _sections(path, config)}
    state = open_state(path)
    if set(state) <= set(BOTH):
        found = {token or state.metadata.get("token", path.stem): _both(path, state, widths)}
    else:
        found = {}
        for key in state:
            shape = state.shape(key)
            if len(shape) not in (1, 2) or not all(shape) or len(state) > 32:
                some = ", ".join(list(state)[:3])
                raise ValueError(f"{path} holds no embedding: its {len(state)} keys are {some}")
            name = token or (path.stem if key in NAMELESS else key)
            found.setdefault(name, {})[_encoder(path, shape[-1], widths)] = state[key]
        if token and len(state) > 1:
            raise ValueError(f"{path} holds {len(state)} tokens, so they cannot be called {token}")
    made = []
    for name, vectors in found.items():
        vectors = {
            encoder: np.asarray(rows, np.float32).reshape(-1, widths[encoder])
            for encoder, rows in vectors.items()
        }
        if not all(np.isfinite(rows).all() for rows in vectors.values()):
            raise ValueError(f"{path}: the vectors of {name!r} are not finite")
        made.append(Embedding(name, vectors))
    return made


def add_embeddings(
    path: str | os.PathLike, config: dict[str, Any], params: dict[str, Any], token: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, parameters) of a model with the tokens of a file; see `read_embeddings`.

    Raises ValueError as that, and for a token that the model has or that is no word.
    """
    for embedding in read_embeddings(path, config, token):
        sizes = {encoder: len(rows) for encoder, rows in embedding.vectors.items()}
        try:
            config = with_token(config, embedding.token, sizes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; another name: PATH:NAME") from None
        params = dict(params)
        for encoder, rows in embedding.vectors.items():
            place = table_of(params[encoder])
            table = params[encoder][place]
            rows = rows.astype(table["embedding"].dtype)
            leaf = f"{ADDED}{len(config['conditioning'][encoder]['tokens']) - 1}"
            params[encoder] = params[encoder] | {place: table | {leaf: rows}}
    return config, params


def with_token(config: dict[str, Any], token: str, sizes: dict[str, int]) -> dict[str, Any]:
    """The config with a further token of so many vectors, in each of these text encoders.

    Raises ValueError for a token that exists, is no word, or has more vectors than a prompt.
    """
    if token.split() != [token]:
        raise ValueError(f"a token is a word without spaces, not {token!r}")
    conditioning = dict(config["conditioning"])
    for encoder, count in sizes.items():
        section = conditioning[encoder]
        tokenizer = make_tokenizer(section, section["network"].get("max_length", 77))
        tokens = section.get("tokens") or []
        known = any(name.lower() == token.lower() for name, _ in tokens)
        if known or (len(tokenizer.pieces([token])[0]) == 1 and not tokenizer.unknown(token)):
            raise ValueError(f"the model already has the token {token!r}")
        start, end, _ = tokenizer.frame
        if count > (room := tokenizer.max_length - len(start) - len(end)):
            raise ValueError(f"{count} vectors of {token!r}, and a prompt has room for {room}")
        conditioning[encoder] = section | {"tokens": [*map(list, tokens), [token, count]]}
    return config | {"conditioning": conditioning}


def write_embedding(
    path: str | os.PathLike, token: str, vectors: dict[str, np.ndarray], layout: str = "diffusers"
) -> None:
    """Writes the vectors (n, width) of a token, by text encoder, float32; whole or not at all.

    In the layout "a1111" the token is the name of the file. Vectors of two encoders are written as
    SDXL's in either layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: choose one of {', '.join(LAYOUTS)}")
    arrays = [np.asarray(rows, np.float32) for rows in vectors.values()]
    names = BOTH if len(arrays) == 2 else (token if layout == "diffusers" else "emb_params",)
    header = {"format": "pt", "software": f"ldm_jax {__version__}", "token": token}
    write_safetensors(path, dict(zip(names, arrays, strict=True)), header)


def table_of(encoder: dict[str, Any]) -> str:
    """The name of the embedding of tokens in a text encoder's parameters."""
    return next(name for name in TABLES if name in encoder)


def _sections(path: Path, config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    if not (sections := texts(config)):
        raise ValueError(f"{path}: an embedding is for models that take prompts; this one does not")
    return list(sections.items())


def _encoder(path: Path, width: int, widths: dict[str, int]) -> str:
    """The first text encoder of this width."""
    for name, own in widths.items():
        if own == width:
            return name
    raise ValueError(f"{path} is of another model: it {_compared(width, widths)}")


def _compared(width: int, widths: dict[str, int]) -> str:
    of = f", as those of {FAMILIES[width]}" if width in FAMILIES else ""
    here = " and ".join(map(str, widths.values()))
    return f"holds vectors {width} wide{of}, and here they are {here} wide"


def _both(path: Path, state: Tensors, widths: dict[str, int]) -> dict[str, np.ndarray]:
    """The vectors of a file for two text encoders; of a model with the second alone, those."""
    names = [name for name in BOTH if name in state]
    if len(widths) == 1 and len(names) == 2 and state.shape("clip_g")[-1] in widths.values():
        names = ["clip_g"]
    if len(names) > len(widths):
        here = ", ".join(map(str, widths.values()))
        raise ValueError(
            f"{path} is of another model: of SDXL, for two text encoders, and here is one, {here} "
            "wide"
        )
    encoders = list(widths)[-len(names) :] if names == ["clip_g"] else list(widths)
    vectors = dict(zip(encoders, (state[name] for name in names), strict=False))
    for encoder, rows in vectors.items():
        if rows.shape[-1] != widths[encoder]:
            wide = _compared(rows.shape[-1], {encoder: widths[encoder]})
            raise ValueError(f"{path} is of another model: it {wide}")
    return vectors
