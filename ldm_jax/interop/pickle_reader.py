"""Reads torch checkpoints (`.pth`, `.pt`, `.bin`, `.ckpt`) into NumPy: no torch, no code executed.

A torch checkpoint is a pickle, and a pickle is a program: it may name any function of any module
and call it. Here nothing is imported, and nothing is called except `_CALLS` below, which rebuild
dicts and describe tensors (`_Tensor`, `_Storage`); their bytes are read on access, within checked
bounds. All other objects in a checkpoint (arguments, paths, dates, optimizers) become an `Unread`,
which keeps only a name. Of a module of TorchScript the tensors are read, by their names.

So any file could be read. But a file that calls a function that does not make data is probably an
attack, and is refused. These make data: of Python's own library the names in `_DATA`; of others all
classes (with a capital), private helpers (with an underscore), and `_FUNCTIONS`.

Two containers exist. Since torch 1.6 a zip: `NAME/data.pkl`, and one stored (uncompressed) member
`NAME/data/KEY` per storage. Before that a plain file: four pickles (magic number, protocol, system,
the object), a fifth with the storage keys in order, then per storage an int64 length and its bytes.
Format: torch/serialization.py (`_save`, `_legacy_save`).
"""

import functools
import io
import math
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
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


# Makers of data in Python's own library: classes of these modules, and single names.
_DATA = re.compile(
    r"(argparse|builtins|collections|datetime|decimal|enum|exceptions|fractions|ipaddress|itertools"
    r"|pathlib(\._local)?|random|typing|uuid|zoneinfo)\._?[A-Z]\w*"
    r"|(builtins|__builtin__)\.(bool|bytearray|bytes|complex|float|frozenset|int|list|long|object"
    r"|range|set|slice|str|tuple|unicode|xrange)"
    r"|array\.(array|_array_reconstructor)|collections\.deque|copy_?reg\._reconstructor"
    r"|codecs\.encode|datetime\.(date|datetime|time|timedelta|timezone)|functools\.partial"
    r"|itertools\.\w+|logging\.(\w*Logger|getLogger)|operator\.(getitem|itemgetter)|re\._compile"
    r"|signal\.Signals|time\.struct_time|zoneinfo\.ZoneInfo\._unpickle"
    r"|types\.(GenericAlias|MappingProxyType|SimpleNamespace|UnionType)"
)
# Makers of data elsewhere, besides classes and private helpers.
_FUNCTIONS = re.compile(r"numpy\.(dtype|ndarray|_?core\.multiarray\.scalar)|torch\.d(evice|type)")


def _makes_data(path: str) -> bool:
    name = path.rpartition(".")[2]
    if path.split(".")[0] in {*sys.stdlib_module_names, "__builtin__", "copy_reg", "exceptions"}:
        # `_operator` implements `operator`, and so on.
        return bool(_DATA.fullmatch(path) or _DATA.fullmatch(path.removeprefix("_")))
    private = name.startswith("_") and not name.endswith("__")
    return private or name[:1].isupper() or bool(_FUNCTIONS.fullmatch(path))


class Unread:
    """An object of a checkpoint that is not a weight; only its class's name is kept.

    `tensors`: whether its arguments contained tensors.
    """

    def __init__(self, name: str, content: Any = ()):
        self.name, self.tensors = name, _holds_tensors(content)

    def __call__(self, *content: Any) -> "Unread":
        """The result of a call in the file; ValueError if the call does more than make data."""
        if not _makes_data(self.name):
            raise ValueError(
                f"refuses to call {self.name}: a checkpoint of weights does not need it"
            )
        return Unread(self.name, content)

    def take(self, *_: Any) -> None:
        """Ignores items that the file adds to a list, set or dict that is an `Unread`."""

    append = extend = add = update = __setitem__ = take


class _Module(dict):
    """The attributes of a module of TorchScript: tensors, modules and plain values."""


def _holds_tensors(content: Any, depth: int = 3) -> bool:
    if isinstance(content, _Tensor | _Storage):
        return True
    return bool(
        depth
        and isinstance(content, tuple | list)
        and any(_holds_tensors(part, depth - 1) for part in content)
    )


def _rebuild_tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _rebuild_from_type(rebuild: Callable, kind: Any, args: tuple, _: Any) -> Any:
    """A tensor with attributes or a class of its own, whose meaning is unknown."""
    known = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")
    return rebuild(*args) if kind.name in known else Unread(kind.name, args)


_STORAGES = {
    f"{name}Storage": np.dtype(kind)
    for name, kind in dict(
        Double="<f8",
        Float="<f4",
        Half="<f2",
        BFloat16=ml_dtypes.bfloat16,
        ComplexFloat="<c8",
        ComplexDouble="<c16",
        Long="<i8",
        Int="<i4",
        Short="<i2",
        Char="i1",
        Byte="u1",
        Bool="?",
        # For tensors that this reader cannot rebuild.
        QInt8="u1",
        QUInt8="u1",
        QInt32="<i4",
        Untyped="u1",
    ).items()
}
_SCRIPTED = "__torch__."
_PARAMETERS = "torch.nn.modules.container.ParameterDict"
_CALLS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": tuple,
    "collections.OrderedDict": lambda items=(): dict(items),
    "collections.defaultdict": lambda *_: {},
    "builtins.dict": dict,
    "__builtin__.dict": dict,
}


class _Reader(pickle._Unpickler):
    """The unpickler in Python; the one in C allocates memory for any memo index."""

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        return _CALLS.get(f"{module}.{name}") or Unread(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # before torch 1.6: a class, with its source text
            return pid[1]
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(view):
            raise ValueError(f"a storage of {getattr(dtype, 'name', dtype)} is not supported")
        # Neither is printed: nested tuples of a few bytes can have texts without end.
        if type(numel) is not int or numel < 0 or not isinstance(key, str | int):
            raise ValueError("a storage whose key or number of elements makes no sense")
        storage = _Storage(str(key), dtype, numel)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {key} is described in two ways")
        return storage

    def _new(self) -> None:
        """An object of a class, without a call of its constructor."""
        content, kind = self.stack.pop(), self.stack.pop()
        if getattr(kind, "name", "").startswith(_SCRIPTED):
            self.append(_Module())
            return
        self.append(Unread(getattr(kind, "name", str(kind)), content))

    def _new_with_keywords(self) -> None:
        self.stack.pop()
        self._new()

    def _set_state(self) -> None:
        """The state of an object; of torch's dict of parameters, which is read, its content."""
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, _Module) and isinstance(state, dict):
            made.update(state)
        if isinstance(made, Unread) and made.name == _PARAMETERS and isinstance(state, dict):
            content = state.get("_parameters")
            self.stack[-1] = content if isinstance(content, dict) else made

    dispatch = {
        **pickle._Unpickler.dispatch,
        pickle.NEWOBJ[0]: _new,
        pickle.NEWOBJ_EX[0]: _new_with_keywords,
        pickle.BUILD[0]: _set_state,
    }


def _check(name: str, tensor: _Tensor, file_bytes: int) -> None:
    """Raises ValueError for a tensor outside of its storage. Python's integers do not overflow."""
    storage, offset, size, stride = tensor
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage):
        raise ValueError(f"{name} has no storage")
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{name} has shape {size}, strides {stride} and offset {offset!r}")
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if 0 not in size and end > storage.numel:
        raise ValueError(f"{name} of shape {size} needs {end} of {storage.numel} elements")
    if math.prod(size) * storage.dtype.itemsize > file_bytes:
        raise ValueError(f"{name} of shape {size} would be larger than the whole file")


def _open_zip(path: Path, file_bytes: int) -> tuple[Any, Callable[[str], bytes]]:
    """The pickled object, and a function that reads a storage's bytes."""
    archive = zipfile.ZipFile(path)
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
    reader = _Reader(io.BytesIO(archive.read(pickles[0])))
    tree = reader.load()
    for storage in reader.storages.values():
        member, expected = f"{root}data/{storage.key}", storage.numel * storage.dtype.itemsize
        if member not in members:
            raise ValueError(f"has no member {member}")
        if (found := members[member].file_size) != expected:
            raise ValueError(f"{member} has {found} bytes, its tensors expect {expected}")
    return tree, lambda key: archive.read(f"{root}data/{key}")


def _open_legacy(path: Path, file_bytes: int) -> tuple[Any, Callable[[str], bytes]]:
    """As `_open_zip`."""
    places = {}
    with open(path, "rb") as file:
        if _Reader(file).load() != _LEGACY_MAGIC:
            raise ValueError("is a pickle, but not one that torch.save wrote")
        _Reader(file).load()  # protocol version
        if not _Reader(file).load().get("little_endian", True):
            raise ValueError("was written on a big-endian machine, which is not supported")
        reader = _Reader(file)
        tree = reader.load()
        for key in _Reader(file).load():
            (numel,) = struct.unpack("<q", file.read(8))
            storage = reader.storages[key]
            size = numel * storage.dtype.itemsize
            if numel != storage.numel or size > file_bytes - file.tell():
                raise ValueError(
                    f"storage {key}, {storage.numel} elements, is cut short or mislabelled"
                )
            places[key] = file.tell(), size
            file.seek(size, io.SEEK_CUR)
    if lacking := reader.storages.keys() - places.keys():
        raise ValueError(f"storage {min(lacking)} is missing")

    def read(key: str) -> bytes:
        offset, size = places[key]
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    return tree, read


class Stored(NamedTuple):
    """A tensor of a checkpoint, and how to read it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def _named(module: _Module, prefix: str = "", depth: int = 30) -> Iterator[tuple[str, _Tensor]]:
    """The tensors of a module of TorchScript and of those in it, by names with dots."""
    if not depth:
        raise ValueError(f"{prefix[:80]}…: modules in modules without end")
    for name, value in module.items():
        if isinstance(value, _Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Module):
            yield from _named(value, f"{prefix}{name}.", depth - 1)


def _weights(tree: Any) -> dict[str, _Tensor]:
    """The named tensors of a checkpoint."""

    def has_tensors(node: Any) -> bool:
        return isinstance(node, dict) and any(isinstance(t, _Tensor) for t in node.values())

    if isinstance(tree, _Module):
        tree = dict(_named(tree))
    if isinstance(tree, dict):
        if set(tree) >= {"image_proj", "ip_adapter"} and all(has_tensors(n) for n in tree.values()):
            return {f"{part}.{name}": t for part, n in tree.items() for name, t in n.items()}
        inner = [node for node in tree.values() if has_tensors(node)]
        only = inner[0] if len(inner) == 1 and not has_tensors(tree) else tree
        named = (tree.get(key) for key in ("state_dict", "string_to_param"))
        tree = next((part for part in named if isinstance(part, dict | Unread)), only)
    if not isinstance(tree, dict):
        what = tree.name if isinstance(tree, Unread) else type(tree).__name__
        raise ValueError(f"holds a {what}, where a dict of tensors was expected")
    for name, value in tree.items():
        if isinstance(value, Unread) and value.tensors:
            raise ValueError(f"{name} is a tensor that {value.name} makes, which we do not know")
        if isinstance(name, Unread) and isinstance(value, _Tensor):
            raise ValueError(f"a tensor has a {name.name} for a name, where a text was expected")
    return {name: t for name, t in tree.items() if isinstance(name, str) and isinstance(t, _Tensor)}


def read_checkpoint(path: str | os.PathLike) -> dict[str, Stored]:
    """The tensors of a torch checkpoint by name.

    They are at its top, in "state_dict", in "string_to_param" (textual inversions), in its only
    dict, or in "image_proj" and "ip_adapter" (IP-Adapters), whose names their names begin with.

    All other content is ignored. A tensor is read on access: a read-only view with the shape, dtype
    (bfloat16 by ml_dtypes) and memory order of the saved tensor.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is empty, truncated, not a torch checkpoint, or implausibly large when
        unpacked; it calls a function that does not make data; or a tensor is made by an unknown
        function. The text begins with the path and names what was refused.
    """
    path = Path(path)
    with open(path, "rb") as file:
        start = file.read(4)
    file_bytes = path.stat().st_size

    def explained(error: Exception) -> ValueError:  # a damaged file can fail in any way at all
        ours = type(error) is ValueError
        return ValueError(f"{path}: {error if ours else f'damaged or truncated ({error!r})'}")

    try:
        if not start:
            raise ValueError("is empty")
        if start == b"PK\x03\x04":
            tree, read_storage = _open_zip(path, file_bytes)
        elif start[:1] == b"\x80":
            tree, read_storage = _open_legacy(path, file_bytes)
        else:
            raise ValueError(f"is not a torch checkpoint: it begins with {start!r}")
        tensors = _weights(tree)
        for name, tensor in tensors.items():
            _check(name, tensor, file_bytes)
    except Exception as error:
        raise explained(error) from error
    # Tensors that share a storage are mostly adjacent.
    bytes_of = functools.lru_cache(maxsize=1)(read_storage)

    def read(tensor: _Tensor) -> np.ndarray:
        storage, offset, size, stride = tensor
        item = storage.dtype.itemsize
        if 0 in size:
            return np.zeros(size, storage.dtype)
        try:
            data = bytes_of(storage.key)
            return np.ndarray(size, storage.dtype, data, offset * item, [n * item for n in stride])
        except Exception as error:
            raise explained(error) from error

    return {
        name: Stored(tensor.size, tensor.storage.dtype, functools.partial(read, tensor))
        for name, tensor in tensors.items()
    }
