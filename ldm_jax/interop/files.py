"""Tensors in files: safetensors and torch checkpoints, whole or in shards.

The type of a file is recognised from its content, not its name. Opening reads names, shapes and
types; a tensor is read on access, so that a file is never in memory as a whole.
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
from safetensors import SafetensorError, safe_open

from ldm_jax.interop.pickle_reader import read_checkpoint

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


class Entry(NamedTuple):
    """A tensor in a file: its place, shape and type, and a function that reads it."""

    place: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name, each read from the file at every access.

    `shape`, `dtype` and `place` ("FILE: KEY") of a name cost nothing. `metadata` is the text in the
    header of a safetensors file.
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
        """Only the tensors of `names`, new name → current name."""
        entries = {new: self._entries[name] for new, name in names.items()}
        return Tensors(entries, self.metadata)

    def joined(self, shapes: Mapping[str, tuple[int, ...]]) -> "Tensors":
        """These tensors, and names that have only a shape and cannot be read."""
        entries = {name: Entry(name, shape, np.dtype("f4"), None) for name, shape in shapes.items()}
        return Tensors(self._entries | entries, self.metadata)


def open_state(path: str | os.PathLike) -> Tensors:
    """The tensors of one safetensors file or torch checkpoint, in the types that it stores.

    Of a checkpoint, those of its "state_dict" if it has one; see `read_checkpoint`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is empty, truncated, damaged, of another kind, or holds no tensors; or
        a checkpoint that `read_checkpoint` refuses. Names file and key.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}, where a file of weights was expected")
    with open(path, "rb") as file:
        start = file.read(64)
    metadata: dict[str, str] = {}
    if not start:
        raise ValueError(f"{path} is empty")
    if start[8:9] == b"{":  # neither a pickle nor a zip has a brace there
        entries, metadata = _open_safetensors(path, *struct.unpack("<Q", start[:8]))
    elif start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        entries = {
            name: Entry(f"{path}: {name}", *tensor)
            for name, tensor in read_checkpoint(path).items()
        }
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


def _open_safetensors(path: Path, header: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata; safetensors checks that the tensors fill the file without overlap."""
    entries, offset = {}, 8 + header
    try:
        with safe_open(os.fspath(path), framework="np") as file:
            for name in file.offset_keys():
                place, about = f"{path}: {name}", file.get_slice(name)
                code, shape = about.get_dtype(), tuple(about.get_shape())
                if code not in DTYPES:
                    raise ValueError(f"{place} is of type {code}: known are {', '.join(DTYPES)}")
                read = _reader(path, DTYPES[code], shape, offset)
                entries[name] = Entry(place, shape, DTYPES[code], read)
                offset += math.prod(shape) * DTYPES[code].itemsize
            return entries, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, damaged or no safetensors file: {error}") from error


def _reader(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> Callable:
    # safetensors maps the file, and pages of a mapped file count as memory of the process; and it
    # does not support float8 in NumPy.
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
    """Writes tensors one by one, unchanged. The file is written whole or not at all, mode 0644.

    safetensors' writer needs contiguous arrays, and most of ours are transposed views.

    Raises ValueError for a type that safetensors cannot hold.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    # Wide types first, as in the safetensors library, so that all tensors are aligned.
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
