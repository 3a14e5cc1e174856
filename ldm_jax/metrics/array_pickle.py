"""Reads pickles of nested dicts of NumPy arrays, as JAX codes pass weights around, calling nothing.

A pickle is a program that may call any function. Of this one nothing is imported, and calls are
followed only where they make an array, a type of one, bytes or a dict: `_CALLS`. All else is
refused. The arrays lie in the file itself, so that none is larger than it.
"""

import math
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ldm_jax.interop.files import Entry, Tensors

# How a torch checkpoint before torch 1.6 begins, a pickle too: its magic number.
_OF_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_NUMBERS = re.compile(r"[<>=|]?(f[248]|[iu][1248]|b1)")
_DEPTH = 20  # of dicts in dicts


def is_array_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle, and not as a torch checkpoint."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(len(_OF_TORCH))
    return start[:1] == b"\x80" and start != _OF_TORCH


def open_array_pickle(path: Path) -> Tensors:
    """The arrays of a pickle, by the keys that lead to them with slashes between.

    Raises:
      ValueError: the file is damaged, calls a function that makes no array, or holds other than
        arrays in dicts by texts.
    """
    try:
        with open(path, "rb") as file:
            tree = _Reader(file).load()
        arrays = dict(_leaves(tree, ()))
    except Exception as error:  # a damaged file can fail in any way at all
        ours = type(error) is ValueError
        what = error if ours else f"damaged or truncated ({error!r})"
        raise ValueError(f"{path}: {what}") from error
    if not arrays:
        raise ValueError(f"{path} holds no arrays")
    return Tensors(
        {
            name: Entry(f"{path}: {name}", array.shape, array.dtype, lambda array=array: array)
            for name, array in arrays.items()
        }
    )


class _Type:
    """A dtype in the making: its byte order comes after its name."""

    def __init__(self, name: Any, *_: Any):
        if not isinstance(name, str) or not _NUMBERS.fullmatch(name):
            raise ValueError(f"holds an array of {name!r}, where numbers were expected")
        self.dtype = np.dtype(name)

    def build(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array in the making: all but its class comes after the call that makes it."""

    array: np.ndarray

    def build(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        self.array = _array(data, kind, shape, "F" if fortran else "C")


def _array(data: Any, kind: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(kind, _Type) or not isinstance(data, bytes | bytearray):
        raise ValueError("holds an array of objects, where numbers were expected")
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"holds an array of shape {shape}")
    if math.prod(shape) * kind.dtype.itemsize != len(data):
        raise ValueError(f"holds {len(data)} bytes for an array of {kind.dtype} {tuple(shape)}")
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order)


def _from_buffer(data: Any, kind: Any, shape: Any, order: str, *_: Any) -> _Array:
    made = _Array()
    made.array = _array(data, kind, shape, order)
    return made


_MODULES = ("numpy.core", "numpy._core")
_CALLS: dict[str, Callable] = {
    **{f"{module}.multiarray._reconstruct": lambda *_: _Array() for module in _MODULES},
    **{f"{module}.numeric._frombuffer": _from_buffer for module in _MODULES},
    "numpy.ndarray": lambda *_: _Array(),
    "numpy.dtype": _Type,
    "_codecs.encode": lambda text, _="latin1": str(text).encode("latin1"),
    "__builtin__.bytes": lambda: b"",  # of an array without elements
    "collections.OrderedDict": lambda items=(): dict(items),
    "flax.core.frozen_dict.FrozenDict": dict,
}


class _Reader(pickle._Unpickler):
    """The unpickler in Python; the one in C allocates memory for any memo index."""

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> Callable:
        path = f"{module}.{name}"
        if path not in _CALLS:
            raise ValueError(f"refuses to call {path}: a file of arrays does not need it")
        return _CALLS[path]

    def persistent_load(self, _: Any) -> Any:
        raise ValueError("refers to another file: arrays were expected in this one")

    def _refuse(self) -> None:
        raise ValueError("makes an object, where arrays were expected")

    def _build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if not isinstance(made, _Type | _Array):
            self._refuse()
        made.build(state)

    dispatch = {
        **pickle._Unpickler.dispatch,
        pickle.NEWOBJ[0]: _refuse,
        pickle.NEWOBJ_EX[0]: _refuse,
        pickle.BUILD[0]: _build,
    }


def _leaves(node: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays under a node, by name; keys that hold nothing (None) are passed over."""
    where = "/".join(keys) or "the file"
    if isinstance(node, _Array):
        yield where, node.array
    elif isinstance(node, dict) and len(keys) < _DEPTH:
        for key, value in node.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has a key {type(key).__name__}, not a text")
            yield from _leaves(value, (*keys, key))
    elif node is not None:
        raise ValueError(f"{where} holds a {type(node).__name__}, where arrays were expected")
