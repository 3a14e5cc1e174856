"""Other people's data sets as streams of pictures: folders, webdataset's tars, parquet files.

- Folders: what `FolderSource` reads; `picture.json` beside a picture has its scores.
- Tars: successive members KEY.jpg (or another picture), and optionally KEY.txt (the caption),
  KEY.json (scores, sizes, a caption) and KEY.cls (the class), as img2dataset and webdataset write.
- Parquet: a column with the bytes of pictures, or of structs with the field `bytes` as Hugging Face
  writes (of several, the first of `PICTURES`, else the first); captions are in the first of
  `CAPTIONS` that there is, classes in `label`.

Keys of JSON and columns are compared without regard to the case of their letters.
"""

import hashlib
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.data.captions import BESIDE, UNREADABLE
from ldm_jax.data.folder import EXTENSIONS, FolderSource
from ldm_jax.data.index import list_files
from ldm_jax.data.tars import groups
from ldm_jax.data.text_files import printable

CAPTIONS = ("text", "caption", "captions", "prompt")
LABELS = ("label", "class", "cls")
PICTURES = ("image", "img", "picture", "jpg", "png", "webp")
# The names of each score in LAION's and others' files, in lower case.
SCORES = {
    "watermark": ("pwatermark",),
    "unsafe": ("punsafe",),
    "aesthetic": ("aesthetic", "aesthetic_score"),
}
# (height, width) of the file before whoever made the data set resized it; the first wins.
SIZES = (("original_height", "original_width"), ("height", "width"))
_KEPT = {*CAPTIONS, *LABELS, *itertools.chain(*SCORES.values(), *SIZES)}
_ENDINGS = tuple(f".{extension}" for extension in EXTENSIONS)
_PARTS = {*EXTENSIONS, *(suffix[1:] for suffix in BESIDE), "json", "cls"}
NO_PICTURE = "no picture"


class Item(NamedTuple):
    """A record of a data set, not decoded.

    Attributes:
      name: unique in the data set.
      picture: the bytes of its file, or the path.
      captions: "" among them for an empty one.
      label: the name of its class, "" if it has none.
      about: scores and sizes by key, in lower case.
      fault: why it cannot be used, "" if it may be.
      lost: why its caption is lost, "" if it is not.
    """

    name: str
    picture: bytes | str = b""
    captions: tuple[str, ...] = ()
    label: str = ""
    about: dict[str, Any] = {}
    fault: str = ""
    lost: str = ""


@dataclass(frozen=True)
class Columns:
    """Columns of parquet files and keys of JSON, where the usual names do not suffice."""

    image: str = ""
    caption: str = ""
    label: str = ""


@dataclass(frozen=True)
class DataSet:
    """A data set in a fixed order.

    Attributes:
      files: number of its files; a folder of pictures counts as one.
      read: (file, start) → its items from item `start` on.
      digest: of all that decides which items there are; it shows that a data set has changed.
      lost_captions: their number by reason, of captions that belong to no item.
    """

    files: int
    read: Callable[[int, int], Iterator[Item]]
    digest: str
    lost_captions: dict[str, int]


def open_data_set(
    path: str, kind: str, columns: Columns, folder_options: dict[str, Any]
) -> DataSet:
    """Opens the data set at `path`, a folder or one file.

    Args:
      kind: "folder", "tar", "parquet", or "auto": the one that is there; of tars and the tables
        beside them, the tars.
      folder_options: of `FolderSource`.

    Raises:
      FileNotFoundError: there is no such path.
      ValueError: there is nothing of this kind, several kinds, or a parquet file without pictures.
      ImportError: pyarrow is not installed.
    """
    whole = root = os.path.abspath(os.path.expanduser(path))
    if not os.path.exists(root):
        raise FileNotFoundError(f"--source={printable(path)} does not exist")
    if os.path.isdir(root):
        files = sorted(list_files(root).files)
    else:
        root, file = os.path.split(root)
        files = [file]
    found = {
        "tar": [name for name in files if name.lower().endswith(".tar")],
        "parquet": [name for name in files if name.lower().endswith(".parquet")],
        "folder": [name for name in files if name.lower().endswith(_ENDINGS)],
    }
    if kind == "auto":
        kind = _recognised(path, found)
    if kind == "folder":
        return _open_folder(whole, folder_options)
    if not found[kind]:
        raise ValueError(f"--source={printable(path)} holds no .{kind} file")
    if kind == "parquet":
        for name in found[kind]:
            _open_parquet(os.path.join(root, name), columns)
    read = {"tar": _read_tar, "parquet": _read_parquet}[kind]
    sizes = [(printable(name), os.path.getsize(os.path.join(root, name))) for name in found[kind]]

    def read_from(file: int, start: int) -> Iterator[Item]:
        name = found[kind][file]
        return read(os.path.join(root, name), printable(name), start, columns)

    return DataSet(len(sizes), read_from, _digest(sizes), {})


def _recognised(path: str, found: dict[str, list[str]]) -> str:
    kinds = [kind for kind, files in found.items() if files]
    if kinds == ["tar", "parquet"]:  # img2dataset writes a table beside each tar
        return "tar"
    if not kinds:
        raise ValueError(
            f"--source={printable(path)} holds no picture, .tar or .parquet file, at any depth"
        )
    if len(kinds) > 1:
        raise ValueError(
            f"--source={printable(path)} holds several kinds of data: choose one with "
            + " or ".join(f"--kind={kind}" for kind in kinds)
        )
    return kinds[0]


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _open_folder(root: str, options: dict[str, Any]) -> DataSet:
    source = FolderSource(root, "all", **options)
    faults = [Item(printable(name), fault=fault) for name, fault in source.faults.items()]

    def read(file: int, start: int) -> Iterator[Item]:
        yield from faults[start:]
        for index in range(max(start - len(faults), 0), len(source)):
            known = source.describe(index)
            label = source.classes[known["label"]]
            captions = (known["caption"],) if known["caption"] else ()
            yield Item(known["name"], known["path"], captions, label)

    facts = [
        [known["name"], known["caption"]] for known in map(source.describe, range(len(source)))
    ]
    return DataSet(
        1, read, _digest([facts, sorted(item.name for item in faults)]), source.lost_captions
    )


def about_of(item: Item) -> dict[str, Any]:
    """Scores and sizes of an item; of a picture in a folder they are in `picture.json`.

    Raises:
      ValueError: the file is not JSON.
    """
    if isinstance(item.picture, str):
        path = Path(item.picture).with_suffix(".json")
        return _json(path.read_bytes()) if path.is_file() else {}
    return item.about


def _json(content: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(content)
    except ValueError as error:
        raise ValueError(f"JSON that cannot be read: {error}") from None
    return _lower(entries) if isinstance(entries, dict) else {}


def _lower(entries: dict[str, Any]) -> dict[str, Any]:
    return {key.lower(): value for key, value in reversed(entries.items())}


def _first(entries: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((entries[key] for key in keys if entries.get(key) is not None), None)


def _captions(entries: dict[str, Any], columns: Columns) -> tuple[str, ...]:
    found = _first(entries, (columns.caption.lower(),) if columns.caption else CAPTIONS)
    texts = found if isinstance(found, list) else [found]
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())


def _label(entries: dict[str, Any], columns: Columns) -> str:
    found = _first(entries, (columns.label.lower(),) if columns.label else LABELS)
    return str(found).strip() if isinstance(found, (str, int)) else ""


def _read_tar(path: str, name: str, start: int, columns: Columns) -> Iterator[Item]:
    try:
        with tarfile.open(path, "r:") as tar:
            for number, (key, parts) in enumerate(groups(tar)):
                if number >= start:
                    yield _tar_item(tar, f"{name}/{printable(key)}", parts, columns)
    except (tarfile.TarError, EOFError) as error:
        yield Item(name, fault=f"a damaged or truncated tar: {error}")


def _tar_item(
    tar: tarfile.TarFile, name: str, parts: dict[str, tarfile.TarInfo], columns: Columns
) -> Item:
    content = {end: tar.extractfile(part).read() for end, part in parts.items() if end in _PARTS}
    extension = next((end for end in content if end in EXTENSIONS), "")
    if not extension:
        return Item(name, fault=NO_PICTURE)
    try:
        about = _json(content.get("json", b"{}"))
    except ValueError as error:
        return Item(name, fault=str(error))
    captions, lost = _captions(about, columns), ""
    beside = next((content[e[1:]] for e in BESIDE if e[1:] in content), None)
    if beside is not None and not (columns.caption and captions):
        try:
            text = beside.decode("utf-8-sig").strip()
            captions = (text,) if text else captions
        except UnicodeDecodeError:
            lost = UNREADABLE
    label = content["cls"].decode(errors="replace").strip() if "cls" in content else ""
    label = label or _label(about, columns)
    kept = {key: value for key, value in about.items() if key in _KEPT}
    return Item(f"{name}.{extension}", content[extension], captions, label, kept, lost=lost)


def _open_parquet(path: str, columns: Columns) -> tuple[Any, str, list[str]]:
    """The open file, the column with the pictures, and all columns that are read."""
    shown = printable(path)
    try:
        import pyarrow as pa  # optional
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{shown}: {error}; pip install 'ldm_jax[prepare]'") from error
    try:
        file = parquet.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{shown} is not a whole parquet file: {error}") from error
    schema = file.schema_arrow
    for option, column in vars(columns).items():
        if column and column not in schema.names:
            raise ValueError(
                f"--{option}_column={column}: {shown} has the columns {', '.join(schema.names)}"
            )
    pictures = [field.name for field in schema if _holds_bytes(field.type)]
    usual = [name for wanted in PICTURES for name in pictures if name.lower() == wanted]
    usable = [n for n in pictures if n == columns.image] if columns.image else usual or pictures
    if not usable:
        problem = f"{shown} has no column with the bytes of pictures"
        if any("url" in name.lower() for name in schema.names):
            raise ValueError(
                f"{problem}, only their URLs: download them with img2dataset "
                "(https://github.com/rom1504/img2dataset), then prepare the tars that it writes"
            )
        raise ValueError(f"{problem}; it has {', '.join(schema.names)}")
    named = {usable[0], columns.caption, columns.label}
    return file, usable[0], [n for n in schema.names if n in named or n.lower() in _KEPT]


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return types.is_binary(kind) or types.is_large_binary(kind)


def _class_names(schema: Any, column: str) -> list[str]:
    """The names of the classes of a column with their numbers, where Hugging Face's header has
    them."""
    try:
        header = json.loads(schema.metadata[b"huggingface"])
        return header["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return []


def _read_parquet(path: str, name: str, start: int, columns: Columns) -> Iterator[Item]:
    file, picture, wanted = _open_parquet(path, columns)
    chosen = (columns.label,) if columns.label else LABELS
    label = next((n for key in chosen for n in wanted if n.lower() == key.lower()), "")
    names = _class_names(file.schema_arrow, label)
    number = 0
    try:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if number + rows <= start:
                number += rows
                continue
            for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=wanted):
                for row in batch.to_pylist():
                    if number >= start:
                        yield _row_item(f"{name}/{number}", row, picture, names, columns)
                    number += 1
    except (OSError, ValueError) as error:  # pyarrow's errors are of both kinds
        raise ValueError(f"{printable(path)} cannot be read after row {number}: {error}") from error


def _row_item(
    name: str, row: dict[str, Any], picture: str, names: list[str], columns: Columns
) -> Item:
    content = row.pop(picture)
    content = content["bytes"] if isinstance(content, dict) else content
    if not content:
        return Item(name, fault=NO_PICTURE)
    about = _lower(row)
    label = _label(about, columns)
    if names and label.isdecimal() and int(label) < len(names):
        label = names[int(label)]
    return Item(name, content, _captions(about, columns), label, about)
