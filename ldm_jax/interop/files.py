"""Tensors in other people's files: safetensors and torch checkpoints, whole or in shards.

A file is known by what is in it, whatever its name. Of safetensors only the header is read at once,
and checked; a tensor is read when it is asked for, so that a file is never in memory as a whole.
Format: 8 bytes, the header's length N (little-endian); N bytes of JSON; the tensors, back to back.
"""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ldm_jax.interop.pickle_reader import read_pickle

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, as in the safetensors library


class Entry(NamedTuple):
    """A tensor in a file: where it is, what it is, and how to get it."""

    place: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name, each read anew whenever it is asked for.

    `shape`, `dtype` and `place` ("FILE: KEY") of a name cost nothing. `metadata` is the text that a
    safetensors header has beside its tensors.
    """

    def __init__(self, entries: dict[str, Entry], metadata: dict[str, str] | None = None):
        self._entries = entries
        self.metadata = metadata or {}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._entries[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._entries[name].dtype

    def place(self, name: str) -> str:
        return self._entries[name].place

    def renamed(self, names: Mapping[str, str]) -> "Tensors":
        """The tensors of `names`, new name → name here, and no others."""
        entries = {new: self._entries[name] for new, name in names.items()}
        return Tensors(entries, self.metadata)


def open_state(path: str | os.PathLike) -> Tensors:
    """The tensors of one safetensors file or torch checkpoint, in the types that it stores.

    Of a checkpoint, its "state_dict" if it has one; what is no tensor is left out, and all of it
    is in memory.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is empty, truncated, damaged, of another kind, or holds no tensors; or
        what `read_pickle` refuses. Says file and key.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}, where a file of weights was expected")
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"{path} is empty")
    if start[8:9] == b"{":  # no pickle and no zip has a brace there
        entries, metadata = _read_header(path)
    elif start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        entries, metadata = _read_checkpoint(path), {}
    elif start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS to the file, which `git lfs pull` gets")
    else:
        raise ValueError(
            f"{path} is neither safetensors nor a torch checkpoint, or it is truncated: it begins "
            f"with {start[:16]!r}"
        )
    if not entries:
        raise ValueError(f"{path} holds no tensors")
    return Tensors(entries, metadata)


def _read_checkpoint(path: Path) -> dict[str, Entry]:
    tree = read_pickle(path)
    inner = tree.get("state_dict")
    tree = inner if isinstance(inner, dict) else tree
    return {
        name: Entry(f"{path}: {name}", value.shape, value.dtype, lambda value=value: value)
        for name, value in tree.items()
        if isinstance(name, str) and isinstance(value, np.ndarray)
    }


def _no_duplicates(pairs: list[tuple]) -> dict:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return dict(pairs)


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata of a safetensors file, whose tensors must fill it without overlap."""
    file_bytes = path.stat().st_size
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(file_bytes - 8, _MAX_HEADER):
            raise ValueError(
                f"{path} says that its header has {length} bytes, but the file has {file_bytes}: "
                "it is truncated, or no safetensors file"
            )
        header = file.read(length)
    try:
        header = json.loads(header, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the safetensors header is damaged: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: __metadata__ of the safetensors header is no object")

    start, spans, entries = 8 + length, [], {}
    for name, about in header.items():
        place = f"{path}: {name}"
        dtype, shape, (begin, end) = _describe(place, about)
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{place} has {end - begin} bytes, but shape {list(shape)} of {dtype} needs "
                f"{math.prod(shape) * dtype.itemsize}"
            )
        spans.append((begin, end, name))
        entries[name] = Entry(place, shape, dtype, _reader(path, dtype, shape, start + begin))
    _check_spans(path, sorted(spans), file_bytes - start)
    return entries, metadata


def _describe(place: str, about: object) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    """dtype, shape and span that the header gives a tensor; ValueError if they make no sense."""
    about = about if isinstance(about, dict) else {}
    code, shape, span = (about.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{place} has dtype {code!r}: known are {', '.join(DTYPES)}")
    for numbers in (shape, span):
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"{place} has shape {shape!r} and data_offsets {span!r}")
    if len(span) != 2 or span[0] > span[1]:
        raise ValueError(f"{place} has data_offsets {span}, where [begin, end] was expected")
    return DTYPES[code], tuple(shape), tuple(span)


def _check_spans(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    position, before = 0, None
    for begin, end, name in spans:
        if begin < position:
            raise ValueError(f"{path}: {before} and {name} overlap")
        if begin > position:
            raise ValueError(f"{path}: {begin - position} bytes before {name} belong to no tensor")
        if end > size:
            raise ValueError(f"{path} is truncated: {name} ends {end - size} bytes after the file")
        position, before = end, name
    if position < size:
        raise ValueError(f"{path}: {size - position} bytes at the end belong to no tensor")


def _reader(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> Callable:
    # Reading, not mapping: pages of a mapped file count as memory of the process.
    def read():
        array = np.fromfile(path, dtype, math.prod(shape), offset=offset)
        if array.size < math.prod(shape):
            raise ValueError(f"{path} has become shorter since it was opened")
        return array.reshape(shape)

    return read


def open_shards(folder: str | os.PathLike, stem: str) -> Tensors:
    """The tensors of a network in a folder of diffusers or transformers.

    `stem` is "diffusion_pytorch_model" or "model" (of which pickles are called "pytorch_model").
    safetensors are preferred to pickles, and full precision to half ("fp16"); each may be one file
    or shards with an index.

    Raises:
      FileNotFoundError: there is no such file in the folder, or a shard of an index is missing.
      ValueError: an index that is damaged; and as `open_state`.
    """
    folder = Path(folder)
    pickled = "pytorch_model" if stem == "model" else stem
    candidates = [
        f"{name}{variant}.{suffix}"
        for name, suffix in ((stem, "safetensors"), (pickled, "bin"))
        for variant in ("", ".fp16")
    ]
    for name in candidates:
        if (folder / name).is_file():
            return open_state(folder / name)
        # Where the index has its "fp16" differs between versions of diffusers.
        whole = name.replace(".fp16", "")
        variant = ".fp16" if whole != name else ""
        for index in (f"{whole}.index{variant}.json", f"{whole}{variant}.index.json"):
            if (folder / index).is_file():
                return _open_index(folder / index)
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
    raise FileNotFoundError(f"no weights in {folder}: looked for {candidates}, found {found}")


def _open_index(path: Path) -> Tensors:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        pairs = list(files.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of shards: {error!r}") from error
    if not pairs:
        raise ValueError(f"{path} is an index of no tensors")
    shards: dict[str, Tensors] = {}
    entries = {}
    for name, file in pairs:
        if not isinstance(file, str) or re.search(r"[/\\]|^\.*$", file):
            raise ValueError(f"{path}: {name} is in {file!r}, which is no name of a file beside it")
        if file not in shards:
            if not (path.parent / file).is_file():
                raise FileNotFoundError(f"{path} names the shard {file}, which is missing")
            shards[file] = open_state(path.parent / file)
        if name not in shards[file]:
            raise ValueError(f"{path} says that {name} is in {file}, where it is not")
        entries[name] = shards[file]._entries[name]
    return Tensors(entries)


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors as they are, one by one. The file appears whole or not at all, mode 0644.

    Raises ValueError for a type that safetensors cannot hold.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    # Wide types first, as the safetensors library does, so that all lie aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    position = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _CODES:
            raise ValueError(f"{name} is {tensor.dtype}: known are {', '.join(map(str, _CODES))}")
        span = [position, position + tensor.nbytes]
        code = _CODES[tensor.dtype]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": span}
        position = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                np.ascontiguousarray(tensors[name]).tofile(file)
        part.chmod(0o644)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
