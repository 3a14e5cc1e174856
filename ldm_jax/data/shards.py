"""Prepared pictures: ArrayRecord files at the training size, as `ldm_jax.prepare` writes them.

A folder of shards holds

- `shard-00000.array_record`, …: the records; see `pack`;
- `shard-00000.json`, …: what is known of its records without reading them; see `Contents`;
- `options.json`: the options of the command that wrote it;
- `report.json`: what was read, kept and dropped, and why; it is written last.

Every file appears under its name only when it is whole.
"""

import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
from grain.sources import ArrayRecordDataSource
from PIL import Image

from ldm_jax.data.faults import Replacements
from ldm_jax.data.images import WHITE, Colour, fit, picture_entries
from ldm_jax.data.splits import check_split, in_split, is_held_out
from ldm_jax.data.text_files import printable

# WebP's fastest lossless settings: a photograph at 512 px is a fifth smaller than as PNG, and is
# written and read faster; slower settings save another 3 %. `exact` keeps the colour of transparent
# pixels.
LOSSLESS = dict(format="WEBP", lossless=True, exact=True, method=1, quality=20)
ENCODINGS = {
    "webp": LOSSLESS,
    "png": dict(format="PNG"),
    "jpeg": dict(format="JPEG", quality=95, subsampling=0),
}

# What a message about a missing file ends with.
MEND = "run the same command of ldm_jax.prepare again, which writes only what is missing"


class Contents(NamedTuple):
    """What is known of a shard without reading its records.

    Attributes:
      bytes: the length of its file.
      next: where the records of the next shard start: (file, record in it); None after the last.
      read: number of records that were read for this shard.
      dropped: for each reason the number of records, and the names of the first.
      lost_captions: their number, by reason.
      names, captions, classes, digests: of each record, in order; "" for no class or caption. The
        digest is that of the pixels.
    """

    bytes: int
    next: tuple[int, int] | None
    read: int
    dropped: dict[str, tuple[int, list[str]]]
    lost_captions: dict[str, int]
    names: list[str]
    captions: list[str]
    classes: list[str]
    digests: list[str]


def shard_path(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"shard-{number:05}.array_record"


def contents_path(folder: str | Path, number: int) -> Path:
    return shard_path(folder, number).with_suffix(".json")


def read_contents(
    folder: str | Path, number: int, kind: type[NamedTuple] = Contents, mend: str = MEND
) -> Any:
    """The contents of a shard, as a `kind` with the field `bytes`.

    Raises:
      ValueError: a file of the shard is missing or not whole; names it, and ends with `mend`.
    """
    path = contents_path(folder, number)
    try:
        contents = kind(**json.loads(path.read_bytes()))
        path = shard_path(folder, number)
        found = os.path.getsize(path)
    except FileNotFoundError:
        raise ValueError(f"{printable(path)} is missing: {mend}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{printable(path)} is damaged ({error}): {mend}") from error
    if found != contents.bytes:
        raise ValueError(f"{printable(path)} has {found} bytes instead of {contents.bytes}: {mend}")
    return contents


def pack(
    square: np.ndarray, original: tuple[int, int], encoding: str, about: dict[str, Any]
) -> bytes:
    """A record: a msgpack map of

    - `picture`: the encoded file of the centre square; `channels`: 3, or 4 with transparency;
    - `original`: (height, width) of the file that it is the centre of;
    - the entries of `about`: `name`, `captions` (a list), `class`, `scores` (a map).

    Args:
      square: uint8 (size, size, 3 or 4).
      encoding: one of ENCODINGS; JPEG has no transparency, so that pictures with it become WebP.
    """
    transparent = square.shape[-1] == 4
    how = LOSSLESS if transparent and encoding == "jpeg" else ENCODINGS[encoding]
    file = io.BytesIO()
    Image.fromarray(square).save(file, **how)
    picture = dict(picture=file.getvalue(), channels=square.shape[-1], original=list(original))
    return msgpack.packb(about | picture)


def unpack(record: bytes) -> tuple[np.ndarray, dict[str, Any]]:
    """The square and all entries of a record.

    Raises:
      Exception: whatever msgpack and Pillow raise for a record that is not whole.
    """
    entries = msgpack.unpackb(record)
    with Image.open(io.BytesIO(entries["picture"])) as file:
        # A file does not always show that a picture has transparency: WebP drops a full opacity.
        return np.asarray(file.convert("RGBA" if entries["channels"] == 4 else "RGB")), entries


class ShardSource:
    """The pictures that `python -m ldm_jax.prepare --out=PATH` wrote.

    Examples are as those of a folder, but without `path`: nothing is beside a picture. The caption
    is the first of a record. The held-out pictures are those of the folder: by the hash of the
    name. A record that turns out to be broken is replaced as a folder's picture is.

    `left_out` and `lost_captions` count what the command dropped, whatever the split.

    Args:
      path: the folder; `~` is expanded.
      split: "train", "held_out" or "all".
      image_size: of the square, pixels; at most that of the command. A smaller one is resized.
      background: what transparent pixels are composited on.
      held_out: the fraction to hold out, 0 to 1.
      on_error: "skip", or "raise" to stop at a broken record.

    Raises:
      FileNotFoundError: the folder does not exist.
      ValueError: it holds no shards, one is missing or not whole, or the pictures are too small.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        image_size: int = 256,
        background: Colour = WHITE,
        held_out: float = 0.1,
        on_error: str = "skip",
    ):
        check_split(split)
        if on_error not in ("skip", "raise"):
            raise ValueError(f'unknown on_error {on_error!r}; choose "skip" or "raise"')
        self._root = os.path.abspath(os.path.expanduser(path))
        self._size, self._background = image_size, tuple(background)
        report = _report(self._root)
        if image_size > report["image_size"]:
            raise ValueError(
                f"data.image_size={image_size}: {printable(self._root)} was prepared with "
                f"--image_size={report['image_size']}; prepare a new folder with the larger size"
            )
        shards = [read_contents(self._root, number) for number in range(report["shards"])]
        names = [name for shard in shards for name in shard.names]
        out = {i for i, name in enumerate(names) if is_held_out(name, held_out)}
        if len(out) == len(names):
            out.clear()
        self._places = [i for i in range(len(names)) if in_split(i in out, split)]
        captions = [caption for shard in shards for caption in shard.captions]
        classes = [label for shard in shards for label in shard.classes]
        self.classes = tuple(sorted(set(classes)))
        labels = {name: label for label, name in enumerate(self.classes)}
        self._names = [names[i] for i in self._places]
        self._captions = [captions[i] for i in self._places]
        self._labels = [labels[classes[i]] for i in self._places]
        self.left_out = {reason: found["count"] for reason, found in report["dropped"].items()}
        self.lost_captions = dict(report["lost_captions"])
        self._records = ArrayRecordDataSource(
            [Records(str(shard_path(self._root, n)), len(s.names)) for n, s in enumerate(shards)]
        )
        strict = on_error == "raise"
        self._replacements = Replacements(self._root, self._labels, self.left_out, strict)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        at, (square, original) = self._replacements.read(index, self._read, self._shown)
        return picture_entries(square, original, self._background) | self._describe(at)

    def describe(self, index: int) -> dict[str, Any]:
        """The example without the entries made from its pixels: nothing is read."""
        return self._describe(self._replacements[range(len(self))[index]])

    def _describe(self, index: int) -> dict[str, Any]:
        return {
            "caption": self._captions[index],
            "label": self._labels[index],
            "name": self._names[index],
        }

    def _read(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        square, entries = unpack(self._records[self._places[index]])
        height, width = entries["original"]
        return fit(square, (self._size, self._size)), (height, width)

    def _shown(self, index: int) -> str:
        return f"the record {self._names[index]} in {printable(self._root)}"


class Records(NamedTuple):
    """A whole file of `take` records, in the form in which ArrayRecordDataSource need not open it
    to count."""

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        return self.take


def _report(root: str) -> dict[str, Any]:
    shown = printable(root)
    if not os.path.isdir(root):
        raise FileNotFoundError(f"data.path {shown!r} is not a folder")
    try:
        return json.loads(Path(root, "report.json").read_bytes())
    except FileNotFoundError:
        if Path(root, "options.json").exists():
            raise ValueError(f"{shown} is not finished: {MEND}") from None
        raise ValueError(
            f"{shown} holds no shards; make them with python -m ldm_jax.prepare --source=PICTURES "
            f"--out={shown}, or read pictures with data.source=folder"
        ) from None
    except ValueError as error:
        raise ValueError(f"{shown}/report.json is damaged ({error}): {MEND}") from error
