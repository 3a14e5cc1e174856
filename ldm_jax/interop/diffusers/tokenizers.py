"""The tokenizers in folders of diffusers, as `vocabulary` and `padding` of our sections, and back.

A tokenizer whose pieces are those that ship is named after them ("clip", "bert"); of another, the
section has the path of its file. transformers writes the pieces into files of their own (merges.txt
and vocab.json, vocab.txt) or, since version 5, into tokenizer.json; either is read. A tokenizer of
another class, or one that ours cannot be, is left to transformers: the section has its folder.
"""

import gzip
import itertools
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from ldm_jax.conditions.tokenizer import (
    END,
    MERGES,
    START,
    VOCABULARIES,
    FolderTokenizer,
    byte_pair_tokenizer,
    find,
)
from ldm_jax.interop.diffusers.components import Json, load

log = logging.getLogger(__name__)
# Those that ours can be; any other goes through transformers.
CLASSES = {
    "CLIPTokenizer": "clip",
    "CLIPTokenizerFast": "clip",
    "BertTokenizer": "bert",
    "BertTokenizerFast": "bert",
    "T5Tokenizer": "sentencepiece",
    "T5TokenizerFast": "sentencepiece",
}


def _lines(path: Path) -> list[str]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return file.read().splitlines()


def _merges(path: Path) -> list[str]:
    """The pairs of a file of merges that count, "a b" each."""
    return [line for line in _lines(path)[1 : MERGES + 1] if line]


def _model(folder: Path) -> dict[str, Any]:
    """What tokenizer.json says of the pieces; nothing if there is none."""
    path = folder / "tokenizer.json"
    return load(path).get("model", {}) if path.is_file() else {}


def _special(folder: Path, name: str, default: str) -> str:
    """The text of a special token, such as "pad_token"."""
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            token = load(folder / file).get(name)
            if token is not None:
                return token["content"] if isinstance(token, dict) else token
    return default


def _check_length(folder: Path, max_length: int) -> None:
    path = folder / "tokenizer_config.json"
    if path.is_file():
        length = load(path).get("model_max_length")
        if length is not None and length < max_length:
            raise ValueError(
                f"{path}: model_max_length={length}, but the text encoder reads {max_length}: "
                "prompts are padded to the latter"
            )


def read_tokenizer(folder: Path, class_name: str, max_length: int) -> dict[str, Any]:
    """Keys of a "clip" or "text" section: `vocabulary`, and what else is not the default.

    Raises:
      FileNotFoundError: the files of the tokenizer are not there.
      ValueError: neither ours nor transformers can read it.
    """
    _check_length(folder, max_length)
    kind = CLASSES.get(class_name)
    try:
        if kind is None:
            raise ValueError(f"{folder} is a {class_name}")
        if kind == "sentencepiece":
            return _read_sentencepiece(folder, class_name)
        return _read_clip(folder) if kind == "clip" else _read_bert(folder)
    except ValueError as error:
        log.info("%s: its tokenizer is read by transformers", error)
        FolderTokenizer(str(folder), max_length)([""])  # refuses what transformers cannot read
        return dict(tokenizer="folder", vocabulary=str(folder.absolute()))


def _read_sentencepiece(folder: Path, class_name: str) -> dict[str, Any]:
    path = folder / "spiece.model"
    if path.is_file():
        return dict(tokenizer="sentencepiece", vocabulary=str(path.absolute()))
    if (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has its pieces in tokenizer.json, not in spiece.model")
    raise FileNotFoundError(f"{path} is missing, the pieces of a {class_name}")


def _read_clip(folder: Path) -> dict[str, Any]:
    own, model = folder / "merges.txt", _model(folder)
    if own.is_file():
        merges = _merges(own)
    elif "merges" in model:
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    else:
        raise FileNotFoundError(
            f"{folder} holds neither merges.txt nor a tokenizer.json with merges"
        )
    shipped = VOCABULARIES / "clip.txt.gz"
    if merges == _merges(shipped):
        vocabulary, path = "clip", shipped
    elif own.is_file():
        vocabulary, path = str(own.absolute()), own
    else:
        raise ValueError(
            f"{folder}/tokenizer.json has merges that are not CLIP's; ours are read from a "
            "merges.txt, which is not there"
        )
    ids = byte_pair_tokenizer(path).get_vocab()
    listed = folder / "vocab.json"
    given = load(listed) if listed.is_file() else model.get("vocab", ids)
    for piece in sorted(ids, key=ids.get):
        if given.get(piece) != ids[piece]:
            where = listed if listed.is_file() else folder / "tokenizer.json"
            raise ValueError(
                f"{where}: {piece!r} has id {given.get(piece)}, and {ids[piece]} by the rule of "
                "CLIP's vocabulary, which is the only one here"
            )
    pad = _special(folder, "pad_token", END)
    if pad not in (END, "!"):
        raise ValueError(f"{folder}: pad_token={pad!r}: expected {END!r} or '!'")
    if pad == "!" and ids["!"] != 0:
        raise ValueError(f"{folder}: pad_token='!' has id {ids['!']}, where OpenCLIP pads with 0")
    return dict(vocabulary=vocabulary, padding="zero" if pad == "!" else "end")


def _read_bert(folder: Path) -> dict[str, Any]:
    own, model = folder / "vocab.txt", _model(folder)
    config = folder / "tokenizer_config.json"
    if config.is_file():
        Json(config).expect(do_lower_case=True)
    if own.is_file():
        pieces = _lines(own)
    elif "vocab" in model:
        pieces = sorted(model["vocab"], key=model["vocab"].get)
    else:
        raise FileNotFoundError(
            f"{folder} holds neither vocab.txt nor a tokenizer.json with a vocab"
        )
    if pieces == _lines(VOCABULARIES / "bert.txt"):
        return dict(vocabulary="bert")
    if not own.is_file():
        raise ValueError(
            f"{folder}/tokenizer.json has pieces that are not BERT's; ours are read from a "
            "vocab.txt, which is not there"
        )
    return dict(vocabulary=str(own.absolute()))


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_class(section: dict[str, Any]) -> str:
    """Of transformers, for a section of kind "clip" or "text"."""
    if section.get("tokenizer") == "folder":
        path = Path(section["vocabulary"]) / "tokenizer_config.json"
        name = load(path).get("tokenizer_class", "TokenizersBackend")
        # The name that version 4 of transformers knows, too.
        return "PreTrainedTokenizerFast" if name == "TokenizersBackend" else name
    if section["kind"] == "text":
        return "BertTokenizer"
    return "T5Tokenizer" if section.get("tokenizer") == "sentencepiece" else "CLIPTokenizer"


def write_tokenizer(folder: Path, section: dict[str, Any], max_length: int) -> None:
    """Writes the tokenizer of a section as transformers reads it. `folder` must not exist."""
    if section.get("tokenizer") == "folder":
        shutil.copytree(section["vocabulary"], folder)
        return
    folder.mkdir(parents=True)
    name = tokenizer_class(section)
    config: dict[str, Any] = dict(tokenizer_class=name, model_max_length=max_length)
    if name == "T5Tokenizer":
        shutil.copyfile(find(section["vocabulary"], ".model"), folder / "spiece.model")
        # T5's own sentinels are no pieces of the model.
        _dump(folder / "tokenizer_config.json", config | dict(extra_ids=0))
        return
    if name == "BertTokenizer":
        shutil.copyfile(find(section["vocabulary"], ".txt"), folder / "vocab.txt")
        names = dict(unk="[UNK]", sep="[SEP]", pad="[PAD]", cls="[CLS]", mask="[MASK]")
        special = {f"{key}_token": token for key, token in names.items()}
        config["do_lower_case"] = True
    else:
        path = find(section["vocabulary"], ".txt.gz")
        ids = byte_pair_tokenizer(path).get_vocab()
        _dump(folder / "vocab.json", dict(sorted(ids.items(), key=lambda item: item[1])))
        lines = itertools.chain(["#version: 0.2"], _merges(path))
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        pad = "!" if section.get("padding", "end") == "zero" else END
        special = dict(bos_token=START, eos_token=END, unk_token=END, pad_token=pad)
    _dump(folder / "special_tokens_map.json", special)
    _dump(folder / "tokenizer_config.json", config | special)
