"""The tokenizers in folders of diffusers, as `vocabulary` and `padding` of our sections, and back.

A tokenizer with the pieces of a bundled vocabulary gets its name ("clip", "bert"); for another, the
section has the path of its file. transformers writes the pieces into separate files (merges.txt
and vocab.json, vocab.txt) or, since version 5, into tokenizer.json; either is read. A tokenizer of
another class, or one that ours cannot express, is read by transformers: the section has its folder.
"""

import gzip
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
from ldm_jax.interop.diffusers.components import dump, load

log = logging.getLogger(__name__)


def _lines(path: Path) -> list[str]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return file.read().splitlines()


def _merges(path: Path) -> list[str]:
    """The pairs of a file of merges that are used, "a b" each."""
    return [line for line in _lines(path)[1 : MERGES + 1] if line]


def _optional(path: Path) -> dict[str, Any]:
    """The object in a JSON file; nothing without a file."""
    return load(path) if path.is_file() else {}


# Bundled vocabulary → its file, the file in folders, the key in tokenizer.json, the reader.
PIECES = {
    "clip": ("clip.txt.gz", "merges.txt", "merges", _merges),
    "bert": ("bert.txt", "vocab.txt", "vocab", _lines),
}


def _vocabulary(folder: Path, name: str) -> str:
    """`name` if the folder's pieces are the bundled ones, else the path of the folder's file."""
    bundled, file, key, read = PIECES[name]
    path, model = folder / file, _optional(folder / "tokenizer.json").get("model", {})
    if path.is_file():
        pieces = read(path)
    elif key not in model:
        raise FileNotFoundError(f"{folder} holds neither {file} nor a tokenizer.json with {key}")
    elif key == "vocab":
        pieces = sorted(model[key], key=model[key].get)
    else:
        pieces = [pair if isinstance(pair, str) else " ".join(pair) for pair in model[key]]
    if pieces == read(VOCABULARIES / bundled):
        return name
    if path.is_file():
        return str(path.absolute())
    raise ValueError(f"{folder} has {key} of its own, and no {file}")


def _read_clip(folder: Path) -> dict[str, Any]:
    vocabulary = _vocabulary(folder, "clip")
    ids = byte_pair_tokenizer(find(vocabulary, ".txt.gz")).get_vocab()
    model = _optional(folder / "tokenizer.json").get("model", {})
    if not ids.items() <= (_optional(folder / "vocab.json") or model.get("vocab", ids)).items():
        raise ValueError(f"{folder} numbers its pieces in another way than CLIP does")
    files = ("special_tokens_map.json", "tokenizer_config.json")
    pads = (_optional(folder / file).get("pad_token") for file in files)
    pad = next(filter(None, pads), END)
    pad = pad["content"] if isinstance(pad, dict) else pad
    if pad not in (END, "!") or pad == "!" and ids["!"] != 0:
        raise ValueError(f"{folder}: pad_token={pad!r}, where CLIP has {END!r} or '!', of id 0")
    return dict(vocabulary=vocabulary, padding="zero" if pad == "!" else "end")


def _read_bert(folder: Path) -> dict[str, Any]:
    if not _optional(folder / "tokenizer_config.json").get("do_lower_case", True):
        raise ValueError(f"{folder} tells capitals from small letters")
    return dict(vocabulary=_vocabulary(folder, "bert"))


def _read_sentencepiece(folder: Path) -> dict[str, Any]:
    path = folder / "spiece.model"
    if path.is_file():
        return dict(tokenizer="sentencepiece", vocabulary=str(path.absolute()))
    if (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has its pieces in tokenizer.json, not in spiece.model")
    raise FileNotFoundError(f"{path} is missing, the pieces of a T5Tokenizer")


# Classes that ours can express, without a "Fast" at the end; transformers reads all others.
READERS = {
    "CLIPTokenizer": _read_clip,
    "BertTokenizer": _read_bert,
    "T5Tokenizer": _read_sentencepiece,
}


def read_tokenizer(folder: Path, class_name: str, max_length: int) -> dict[str, Any]:
    """Keys of a "clip" or "text" section: `vocabulary`, and others that are not the default.

    Raises:
      FileNotFoundError: a file of the tokenizer is missing.
      ValueError: neither ours nor transformers can read it.
    """
    config = folder / "tokenizer_config.json"
    length = _optional(config).get("model_max_length")
    if length is not None and length < max_length:
        raise ValueError(
            f"{config}: model_max_length={length}, but the text encoder reads {max_length}: "
            "prompts are padded to the latter"
        )
    try:
        read = READERS.get(class_name.removesuffix("Fast"))
        if read is None:
            raise ValueError(f"{folder} is a {class_name}")
        return read(folder)
    except ValueError as error:
        log.info("%s: its tokenizer is read by transformers", error)
        FolderTokenizer(str(folder), max_length)([""])  # refuses what transformers cannot read
        return dict(tokenizer="folder", vocabulary=str(folder.absolute()))


def tokenizer_class(section: dict[str, Any]) -> str:
    """The tokenizer of transformers for a section of kind "clip" or "text"."""
    if section.get("tokenizer") == "folder":
        path = Path(section["vocabulary"]) / "tokenizer_config.json"
        name = load(path).get("tokenizer_class", "TokenizersBackend")
        # The name that version 4 of transformers also has.
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
    name, special = tokenizer_class(section), {}
    config: dict[str, Any] = dict(tokenizer_class=name, model_max_length=max_length)
    if name == "T5Tokenizer":
        shutil.copyfile(find(section["vocabulary"], ".model"), folder / "spiece.model")
        config["extra_ids"] = 0  # its own sentinels are no pieces of the model
    elif name == "BertTokenizer":
        shutil.copyfile(find(section["vocabulary"], ".txt"), folder / "vocab.txt")
        config["do_lower_case"] = True
    else:
        path = find(section["vocabulary"], ".txt.gz")
        ids = byte_pair_tokenizer(path).get_vocab()
        dump(folder / "vocab.json", dict(sorted(ids.items(), key=lambda item: item[1])))
        lines = ["#version: 0.2", *_merges(path)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        pad = "!" if section.get("padding", "end") == "zero" else END
        special = dict(bos_token=START, eos_token=END, unk_token=END, pad_token=pad)
    dump(folder / "special_tokens_map.json", special)
    dump(folder / "tokenizer_config.json", config | special)
