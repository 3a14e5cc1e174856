"""Pictures that cannot be used: why, and which others replace them."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from PIL import UnidentifiedImageError

from ldm_jax.data.text_files import printable

log = logging.getLogger(__name__)

MAX_WARNINGS = 10
DAMAGED = "damaged"

T = TypeVar("T")


def fault_of(error: Exception) -> str:
    """Why a picture cannot be used, from the error of reading it."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow can read"
    if type(error) is ValueError:  # our own
        return str(error)
    return f"{DAMAGED}: {type(error).__name__}: {error}"


def reason_of(fault: str) -> str:
    """A fault without the details of one file."""
    if "pixels, " in fault:
        return fault.partition("pixels, ")[2]
    return fault.partition(":")[0]


class Replacements:
    """Which examples replace those that turn out to be broken when they are read.

    It is the next readable one of the same label (of all, if the label has none), cyclically. A
    broken one is named once, and counted.

    Args:
      root: the folder of the source, an absolute path.
      labels: of all its examples.
      left_out: of the source; updated.
      strict: raise instead.
    """

    def __init__(self, root: str, labels: Sequence[int], left_out: dict[str, int], strict: bool):
        self._root, self._labels, self._left_out = root, labels, left_out
        self._strict = strict
        self._replaced: dict[int, int] = {}
        self._unreadable: set[int] = set()

    def __getitem__(self, index: int) -> int:
        """The index of the example that is given for `index`, as far as is known."""
        return self._replaced.get(index, index)

    def read(
        self, index: int, read: Callable[[int], T], name: Callable[[int], str]
    ) -> tuple[int, T]:
        """(index, what `read` gives for it) of the example or of the one that replaces it.

        Args:
          read: raises an exception for a broken example.
          name: how a message names an example.

        Raises:
          FileNotFoundError: the folder is gone.
          ValueError: the example is broken, if `strict`; else no example can be read.
        """
        for at in self._candidates(index):
            try:
                found = read(at)
            except Exception as error:  # of many kinds: OSError, SyntaxError, struct.error, ...
                self._note(at, name(at), error)
                continue
            self._replaced.pop(index, None)
            if at != index:
                self._replaced[index] = at
            return at, found
        raise ValueError(f"{printable(self._root)}: no picture can be read any more")

    def _candidates(self, index: int) -> Iterator[int]:
        """`index` and its replacements, in order: the rest of its class, then the others."""
        yield index
        later = np.r_[index + 1 : len(self._labels), 0:index]
        same = np.asarray(self._labels)[later] == self._labels[index]
        yield from later[same].tolist()
        yield from later[~same].tolist()

    def _note(self, index: int, name: str, error: Exception) -> None:
        if not os.path.isdir(self._root):
            raise FileNotFoundError(f"data.path {printable(self._root)!r} is gone") from error
        if self._strict:
            raise ValueError(f"{name}: {fault_of(error)}") from error
        if index in self._unreadable:
            return
        self._unreadable.add(index)
        self._left_out[DAMAGED] = self._left_out.get(DAMAGED, 0) + 1
        if len(self._unreadable) <= MAX_WARNINGS:
            log.warning("%s cannot be read, another picture replaces it: %s", name, fault_of(error))
        elif len(self._unreadable) == MAX_WARNINGS + 1:
            log.warning("%s: more pictures cannot be read", printable(self._root))
