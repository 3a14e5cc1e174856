"""Latents on disk: the moments of pictures and the states of their captions, in ArrayRecord files,
as `ldm_jax.cache` writes them.

A cache is a folder with

- `train/` and `held_out/`, the splits: `shard-00000.array_record`, …, the records, and
  `shard-00000.json`, …, what is known of them without reading them: see `LatentContents`;
- `options.json`: what it was made of and with; see `training/caching.py`;
- `report.json`: how much there is; it is written last.

A record holds an array's numbers and nothing else. Of each example in turn there are the moments
(h, w, 2c) of its picture, and with `flips` those of the mirror image; then, of each caption of the
shard that is another than those before, the states, one array after the other.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  NumPy gets its bfloat16
import numpy as np
from grain.sources import ArrayRecordDataSource

from ldm_jax.data.placement import Placement
from ldm_jax.data.shards import Records, read_contents, shard_path
from ldm_jax.data.text_files import printable
from ldm_jax.data.whole_files import OPTIONS

SPLITS = ("train", "held_out")
DTYPES = ("float32", "float16", "bfloat16")
FORMAT = "ldm_jax latents 1"
MEND = "run the same command of ldm_jax.cache again, which writes only what is missing"

# Of each text embedder, by the name of a field of its `Conditioning`: shape and type.
States = Mapping[str, Mapping[str, tuple[tuple[int, ...], str]]]


class LatentContents(NamedTuple):
    """What is known of a shard without reading its records.

    Attributes:
      bytes: the length of its file.
      records: their number.
      names, captions, labels: of each example, in order.
      states: of each example, which of the captions of the shard it has; empty: there are none.
      placements: of each example (original, resized, corner, size), eight numbers; empty: unknown.
      errors: of "moments" and "states", what storing them has changed: the sum of the squared
        differences, and that of the squared numbers.
    """

    bytes: int
    records: int
    names: list[str]
    captions: list[str]
    labels: list[int]
    states: list[int]
    placements: list[list[int]]
    errors: dict[str, tuple[float, float]]


class Stored:
    """An array that is read when NumPy first asks for it.

    `mirrored()` is that of the mirror image.
    """

    def __init__(self, read: Callable[[], np.ndarray], mirrored: Callable[[], "Stored"] = None):
        self._read, self.mirrored = read, mirrored

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._read(), dtype)


class _Texts:
    """Many texts in little memory: `add` lists of them, then `whole`, then read by index."""

    def __init__(self):
        self._parts: list[bytes] = []
        self._lengths: list[np.ndarray] = []

    def add(self, texts: list[str]) -> None:
        encoded = [text.encode() for text in texts]
        self._parts.append(b"".join(encoded))
        self._lengths.append(np.array([len(text) for text in encoded], np.int64))

    def whole(self) -> "_Texts":
        self._parts = [b"".join(self._parts)]
        self._lengths = [np.cumsum(np.concatenate([np.zeros(1, np.int64), *self._lengths]))]
        return self

    def __len__(self) -> int:
        return len(self._lengths[0]) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self._lengths[0][index : index + 2]
        return self._parts[0][start:end].decode()


class CachedSource:
    """A split of a cache, as a source; examples also have `moments`, float32 (h, w, 2c), which are
    read when they are used, and of each text embedder NAME `NAME/context` and so on.

    Examples have the captions, labels and placements of the pictures, and their pixels only with
    `pixels`: then the source itself is read as well.

    Args:
      path: the folder; `~` is expanded.
      split: "train" or "held_out".
      open_pictures: opens the source that was encoded.
      pixels: whether examples have what the source gives of a picture.

    Raises:
      ValueError: the cache is not finished, or a shard is missing or not whole, or the source has
        other pictures.
    """

    latents = True

    def __init__(
        self,
        path: str | Path,
        split: str,
        open_pictures: Callable[[], Any],
        pixels: bool = False,
    ):
        self._root = os.path.abspath(os.path.expanduser(path))
        self.options = read_options(path)
        report = json.loads(Path(self._root, "report.json").read_bytes())
        self._folder, self._open = Path(self._root, split), open_pictures
        names, captions, files, first, columns = _Texts(), _Texts(), [], [0], []
        for number in range(report[split]["shards"]):
            shard = read_contents(self._folder, number, LatentContents, MEND)
            names.add(shard.names)
            captions.add(shard.captions)
            numbers = shard.labels, shard.states, shard.placements
            columns.append([np.array(column, np.int32) for column in numbers])
            files.append(Records(str(shard_path(self._folder, number)), shard.records))
            first.append(first[-1] + shard.records)
        self.classes = tuple(self.options["classes"])
        self.left_out = dict(report["left_out"])
        self.lost_captions = dict(report["lost_captions"])
        self._names, self._captions, self._first = names.whole(), captions.whole(), first
        self._counts = [len(labels) for labels, *_ in columns]
        empty = [np.zeros(0, np.int32)] * 3
        self._labels, self._states, self._placements = map(
            np.concatenate, zip(*(columns or [empty]), strict=True)
        )
        self._records = ArrayRecordDataSource(files) if files else ()
        self._dtype = np.dtype(self.options["dtype"])
        self._pixels = pixels
        if pixels and len(self.pictures) != len(self):
            raise ValueError(
                f"{printable(self._root)} has {len(self)} examples in {split}, and data.source "
                f"gives {len(self.pictures)} now: {OTHER_DATA}"
            )

    @functools.cached_property
    def pictures(self) -> Any:
        """The source that was encoded, opened at the first use."""
        return self._open()

    @property
    def states(self) -> States:
        """What there is of each text embedder."""
        return self.options["states"]

    def __len__(self) -> int:
        return len(self._names)

    def describe(self, index: int) -> dict[str, Any]:
        """The example without what is read from the disk."""
        index = range(len(self))[index]
        return {
            "caption": self._captions[index],
            "label": int(self._labels[index]),
            "name": self._names[index],
        }

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.describe(index)
        if self._pixels:
            picture = self.pictures[index]
            if picture["name"] != example["name"]:
                raise ValueError(
                    f"{printable(self._root)} has {example['name']!r} where data.source gives "
                    f"{picture['name']!r}: {OTHER_DATA}"
                )
            example = picture | example
        elif len(self._placements):
            numbers = self._placements[index].reshape(4, 2).tolist()
            example["placement"] = Placement(*map(tuple, numbers))
        flips = self.options["flips"]
        shard, place = divmod(index, self.options["shard_size"])
        first = self._first[shard]
        at = first + place * (1 + flips)
        mirrored = functools.partial(Stored, functools.partial(self._moments, at + 1))
        here = functools.partial(self._moments, at)
        example["moments"] = Stored(here, mirrored if flips else None)
        if len(self._states):
            at = first + self._counts[shard] * (1 + flips) + int(self._states[index])
            example |= self._stored_states(at)
        return example

    def _moments(self, record: int) -> np.ndarray:
        shape = self.options["shape"]
        return self._numbers(record).astype(np.float32).reshape(shape)

    def _stored_states(self, record: int) -> dict[str, Stored]:
        read = functools.cache(functools.partial(self._numbers, record))
        found, start = {}, 0
        for name, fields in self.states.items():
            for field, (shape, dtype) in fields.items():
                part = functools.partial(_part, read, start, tuple(shape), np.dtype(dtype))
                found[f"{name}/{field}"] = Stored(part)
                start += math.prod(shape)
        return found

    def _numbers(self, record: int) -> np.ndarray:
        try:
            return np.frombuffer(self._records[record], self._dtype)
        except Exception as error:  # array_record's are of many kinds
            raise ValueError(
                f"{printable(self._folder)}: record {record} cannot be read ({error})"
            ) from error


OTHER_DATA = "these are other data than those that were encoded; make another cache"


def _part(
    read: Callable[[], np.ndarray], start: int, shape: tuple[int, ...], dtype: Any
) -> np.ndarray:
    return read()[start : start + math.prod(shape)].reshape(shape).astype(dtype)


def read_options(path: str | Path) -> dict[str, Any]:
    """What a finished cache was made of and with.

    Raises:
      ValueError: there is no cache, or it is not finished.
    """
    root = os.path.abspath(os.path.expanduser(path))
    shown = printable(root)
    try:
        options = json.loads(Path(root, OPTIONS).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{shown} is no cache of latents: {error}") from None
    if options.get("format") != FORMAT:
        raise ValueError(
            f"{shown} is no cache of latents, but holds {options.get('format', 'something else')}"
        )
    if not Path(root, "report.json").exists():
        raise ValueError(f"{shown} is not finished: {MEND}")
    return options
