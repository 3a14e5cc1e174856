"""Reads torch checkpoints (`.pth`, `.pt`, `.bin`, `.ckpt`) into NumPy: no torch, nothing executed.

A torch checkpoint is a pickle, and a pickle is a program: it may name any function of any module
and call it. Here a name is looked up in `_STORAGES` and `_CALLS` below and nowhere else, nothing is
ever imported, and `BUILD`, the opcode that sets attributes, is ignored. What the calls leave behind
are descriptions (`_Tensor`, `_Storage`); their bytes are read afterwards, within checked bounds.

Two containers exist. Since torch 1.6 a zip: `NAME/data.pkl`, and one stored (uncompressed) member
`NAME/data/KEY` per storage. Before that a plain file: four pickles (magic number, protocol, system,
the object), a fifth with the storage keys in order, then per storage an int64 length and its bytes.
Format: torch/serialization.py (`_save`, `_legacy_save`).
"""

import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_COMPRESSION = 100  # torch stores uncompressed; a checkpoint zipped again gains a few per cent


class _Storage(NamedTuple):
    """A run of `numel` elements in the file, known by its key."""

    key: str
    dtype: np.dtype
    numel: int


class _Tensor(NamedTuple):
    """A strided view of a storage; offset and stride count elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Name(str):
    """The name of a training framework's class, as text; called, it gives itself."""

    def __call__(self, *args: Any) -> "_Name":
        return self


def _numpy_dtype(kind: str, *_: Any) -> np.dtype:
    if kind not in {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}:
        raise ValueError(f"a NumPy scalar of type {kind!r} is not supported")
    return np.dtype("<" + kind)


def _numpy_scalar(dtype: np.dtype, data: bytes) -> np.generic:
    return np.frombuffer(data, dtype, count=1)[0]


def _rebuild_tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(size), tuple(stride))


_STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
}
_CALLS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch.Size": tuple,
    "torch.device": lambda *place: ":".join(map(str, place)),
    "collections.OrderedDict": lambda items=(): dict(items),
    "collections.defaultdict": lambda *_: {},
    "builtins.dict": dict,
    "__builtin__.dict": dict,
    # Learning rate schedules leave NumPy scalars, whose bytes protocol 2 writes as latin-1 text.
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),
}


class _Reader(pickle._Unpickler):
    """The unpickler written in Python; the one in C allocates whatever a memo index asks for."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module.split(".")[0] in ("pytorch_lightning", "lightning"):
            return _Name(path)  # CompVis checkpoints key their callbacks by class
        if path not in _CALLS:
            raise ValueError(f"refuses to call {path}: a checkpoint of weights has no need of it")
        return _CALLS[path]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(view):
            raise ValueError(f"a storage described as {pid!r} is not supported")
        if type(numel) is not int or numel < 0:
            raise ValueError(f"a storage of {numel!r} elements makes no sense")
        storage = _Storage(str(key), dtype, numel)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {key} is described in two ways")
        return storage

    def _ignore_state(self) -> None:
        self.stack.pop()

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _ignore_state}


def _to_array(tensor: _Tensor, data: bytes, file_bytes: int) -> np.ndarray:
    """A read-only view of `data`. Python integers do the checks: NumPy's own may overflow."""
    storage, offset, size, stride = tensor
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"a tensor has shape {size}, strides {stride} and offset {offset!r}")
    if 0 in size:
        return np.zeros(size, storage.dtype)
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    item = storage.dtype.itemsize
    if end * item > len(data):
        raise ValueError(f"a tensor of shape {size} needs {end} of {len(data) // item} elements")
    if math.prod(size) * item > file_bytes:
        raise ValueError(f"a tensor of shape {size} would be larger than the whole file")
    return np.ndarray(size, storage.dtype, data, offset * item, [step * item for step in stride])


def _resolve(tree: Any, read_storage: Callable[[_Storage], bytes], file_bytes: int) -> Any:
    """`tree` with arrays in place of tensors; what the pickle shares stays shared."""
    done: dict[int, Any] = {}
    unfinished = object()

    def visit(node: Any) -> Any:
        if id(node) not in done:
            done[id(node)] = unfinished
            done[id(node)] = build(node)
        if done[id(node)] is unfinished:
            raise ValueError("holds a container that contains itself")
        return done[id(node)]

    def build(node: Any) -> Any:
        if isinstance(node, _Tensor):
            if not isinstance(node.storage, _Storage):
                raise ValueError("a tensor has no storage")
            return _to_array(node, read_storage(node.storage), file_bytes)
        if isinstance(node, dict):
            return {str(k) if isinstance(k, str) else k: visit(v) for k, v in node.items()}
        if isinstance(node, (list, tuple)) and not isinstance(node, _Storage):
            return type(node)(visit(item) for item in node)
        if isinstance(node, str):
            return str(node)
        if node is None or isinstance(node, (bool, int, float, complex, bytes, np.generic)):
            return node
        raise ValueError(f"holds {node!r}, which is no number, text, list, dict or tensor")

    return visit(tree)


def _read_zip(file: BinaryIO, file_bytes: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if sum(info.compress_size for info in members.values()) > file_bytes:
            raise ValueError("members of the zip overlap, or claim more bytes than the file has")
        for info in members.values():
            if info.file_size > _MAX_COMPRESSION * max(info.compress_size, 1):
                raise ValueError(f"{info.filename} unpacks to {info.file_size} bytes: a zip bomb")
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"is a zip with {len(pickles)} data.pkl, where a checkpoint has one")
        root = pickles[0].removesuffix("data.pkl")
        if root + "byteorder" in members and archive.read(root + "byteorder") != b"little":
            raise ValueError("was written on a big-endian machine, which is not supported")
        tree = _Reader(io.BytesIO(archive.read(pickles[0]))).load()
        cache: dict[str, bytes] = {}

        def read_storage(storage: _Storage) -> bytes:
            member = f"{root}data/{storage.key}"
            expected = storage.numel * storage.dtype.itemsize
            if member not in members:
                raise ValueError(f"has no member {member}")
            if members[member].file_size != expected:
                found = members[member].file_size
                raise ValueError(f"{member} has {found} bytes, its tensors expect {expected}")
            if member not in cache:
                cache[member] = archive.read(member)
            return cache[member]

        return _resolve(tree, read_storage, file_bytes)


def _read_legacy(file: BinaryIO, file_bytes: int) -> Any:
    if _Reader(file).load() != _LEGACY_MAGIC:
        raise ValueError("is a pickle, but not one that torch.save wrote")
    _Reader(file).load()  # protocol version
    if not _Reader(file).load().get("little_endian", True):
        raise ValueError("was written on a big-endian machine, which is not supported")
    reader = _Reader(file)
    tree = reader.load()
    contents = {}
    for key in _Reader(file).load():
        (numel,) = struct.unpack("<q", file.read(8))
        storage = reader.storages[key]
        size = numel * storage.dtype.itemsize
        if numel != storage.numel or size > file_bytes - file.tell():
            raise ValueError(
                f"storage {key}, {storage.numel} elements, is cut short or mislabelled"
            )
        contents[key] = file.read(size)
    return _resolve(tree, lambda storage: contents[storage.key], file_bytes)


def read_pickle(path: str | os.PathLike) -> dict:
    """The contents of a torch checkpoint: nested dicts, lists, tuples, numbers, text and arrays.

    Arrays are read-only views with the shape, dtype (bfloat16 by ml_dtypes) and memory order of
    the saved tensors. Classes of Lightning become their names; a module's `_metadata` is dropped.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is empty, truncated, not a torch checkpoint, larger unpacked than it can
        be, or wants something called. The text begins with the path and names what was refused.
    """
    with open(path, "rb") as file:
        file_bytes = Path(path).stat().st_size
        start = file.read(4)
        file.seek(0)
        try:
            if not start:
                raise ValueError("is empty")
            if start == b"PK\x03\x04":
                tree = _read_zip(file, file_bytes)
            elif start[:1] == b"\x80":
                tree = _read_legacy(file, file_bytes)
            else:
                raise ValueError(f"is not a torch checkpoint: it begins with {start!r}")
            if not isinstance(tree, dict):
                raise ValueError(f"holds a {type(tree).__name__}, where a dict was expected")
        except Exception as error:  # a damaged pickle can fail in any way at all
            ours = type(error) is ValueError
            reason = error if ours else f"damaged or truncated ({error!r})"
            raise ValueError(f"{os.fspath(path)}: {reason}") from error
    return tree
