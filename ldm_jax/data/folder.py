"""A folder of pictures as a source of examples."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from ldm_jax.data.buckets import bucket_shapes, nearest_bucket
from ldm_jax.data.captions import UNREADABLE, find_captions, read_beside, texts_beside
from ldm_jax.data.coco import read_annotations
from ldm_jax.data.faults import MAX_WARNINGS, Replacements, fault_of, reason_of
from ldm_jax.data.images import WHITE, Colour, Shape, picture_entries, read_fitted, read_shape
from ldm_jax.data.index import File, Finding, Listing, examine, folder_index, list_files
from ldm_jax.data.splits import check_split, in_split, is_held_out
from ldm_jax.data.text_files import is_utf8, printable

log = logging.getLogger(__name__)

EXTENSIONS = (
    *("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "avif", "jfif", "jpe", "mpo"),
    *("apng", "dib", "jp2", "j2k", "jpx", "tga", "ppm", "pgm", "pbm", "pnm", "qoi", "ico", "psd"),
)
# Pictures that Pillow does not read are named and counted as well.
FOREIGN = (
    *("heic", "heif", "jxl", "svg"),
    *("arw", "cr2", "cr3", "dng", "nef", "orf", "raf", "rw2"),
)
_ALL_EXTENSIONS = frozenset(EXTENSIONS + FOREIGN)
# Formats without which an installed Pillow may have been built.
CODECS = {"avif": "avif", "webp": "webp", "jp2": "jpg_2000", "j2k": "jpg_2000", "jpx": "jpg_2000"}
# `picture.depth.png` is a condition of `picture.jpg`, not a picture of the folder.
ABOUT_ANOTHER = (".control", ".depth", ".mask", ".segmentation")
NOT_THERE = "annotations of pictures that are not there"
MAX_LOST = 3  # number of captions named for each reason


class FolderSource:
    """All pictures under a folder, including linked but not hidden ones.

    - class: the first sub-folder (`root/CLASS/.../picture.jpg`), "" for a picture in the root
      itself; the sorted classes are the same in every split;
    - caption: the first of the `annotations`, else the text beside it, else from a list (see
      `captions`), else the class, else "";
    - with annotations also `captions`, all of them, and `boxes` and `categories` (see `coco`);
    - held-out: a fixed fraction, by the hash of the path relative to the folder. If that would hold
      out every picture, none is held out; a split may be empty;
    - each picture is resized and centre-cropped to a square of `image_size`, or, with `buckets`, to
      the shape of `bucket_shapes` whose aspect ratio is nearest;
    - bytes of a name that are not UTF-8 are written `\\xe9` in `name` and `classes`; a class with
      such a name gives no caption. `path` is the name in the file system;
    - `picture.depth.png`, `.mask.png`, `.segmentation.png` and `.control.png`, a hint, beside
      `picture.*` are conditions.

    Opening reads the header of each file that is new or changed since the index was made, in
    threads. A file that is not a picture or is too small (short side under `min_size`, by default
    `image_size // 2`, because larger magnification only blurs) is skipped with a warning that names
    it, and counted in `left_out`; captions that cannot be read or that name no picture are counted
    in `lost_captions`. Both count the whole folder, whatever the split.

    Pictures are decoded when read and not kept. A picture that turns out to be broken then is named
    once, counted, and replaced by the next readable one of its class (of the whole split, if its
    class has none), cyclically; `describe` returns the replacement from then on.

    Attributes:
      faults: by name, why a file is skipped.

    Args:
      path: the folder; `~` is expanded. Nothing is written into it.
      split: "train", "held_out" or "all".
      image_size: of the square, pixels.
      background: what transparent pixels are composited on.
      held_out: the fraction to hold out, 0 to 1.
      on_error: "skip", or "raise" to stop at a broken picture or text.
      min_size: pixels.
      index: the file that stores the findings between starts (see `index`); None: they are kept in
        memory, for this process.
      annotations: paths of files in COCO's format, on pictures of this folder.
      buckets: whether pictures have several shapes. Then `shapes` are those in use, and `groups`,
        int (N,), is the index of each example's in them.

    Raises:
      FileNotFoundError: the folder or a file of annotations does not exist.
      ValueError: it has no usable picture, a list of captions or a file of annotations is
        malformed, or, under `on_error="raise"`, a file is bad, at opening or at reading.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        image_size: int = 256,
        background: Colour = WHITE,
        held_out: float = 0.1,
        on_error: str = "skip",
        min_size: int = 0,
        index: str | Path | None = None,
        buckets: bool = False,
        annotations: Sequence[str] = (),
    ):
        check_split(split)
        if on_error not in ("skip", "raise"):
            raise ValueError(f'unknown on_error {on_error!r}; choose "skip" or "raise"')
        self._root = os.path.abspath(os.path.expanduser(path))
        self._background = tuple(background)
        self._raise = on_error == "raise"
        if not os.path.isdir(self._root):
            raise FileNotFoundError(f"data.path {printable(self._root)!r} is not a folder")

        listing = list_files(self._root)
        pictures = _pictures(listing)
        beside = texts_beside(pictures, listing.files)
        with folder_index(self._root, index) as known:
            headers, texts = known.setdefault("pictures", {}), known.setdefault("texts", {})
            examine(headers, pictures, _read_header, "Checking pictures")
            examine(texts, beside, read_beside, "Reading captions")
        faults = _faults(listing, headers, min_size or image_size // 2)
        usable = sorted(pictures.keys() - faults.keys(), key=printable)
        captions, lost = find_captions(self._root, pictures, listing.files, texts)
        self._annotations = None
        if annotations:
            self._annotations = read_annotations(annotations, pictures)
            captions |= {name: told[0] for name, told in self._annotations.captions.items()}
            lost |= {NOT_THERE: self._annotations.absent} if self._annotations.absent else {}

        self.faults = faults
        self.left_out = dict(Counter(reason_of(fault) for fault in faults.values()))
        self.lost_captions = {reason: len(messages) for reason, messages in lost.items()}
        if self._raise and faults:
            name, fault = next(iter(faults.items()))
            raise ValueError(f"{self._shown(name)}: {fault}")
        if self._raise and UNREADABLE in lost:
            raise ValueError(lost[UNREADABLE][0])
        if not usable:
            raise ValueError(self._nothing_usable(len(faults)))

        out = {name for name in usable if is_held_out(printable(name), held_out)}
        if len(out) == len(usable):
            out.clear()
        self._names = [name for name in usable if in_split(name in out, split)]
        self.classes = tuple(sorted({printable(_class_of(name)) for name in usable}))
        labels = {name: label for label, name in enumerate(self.classes)}
        self._labels = [labels[printable(_class_of(name))] for name in self._names]
        self._captions = [captions.get(name, _class_caption(name)) for name in self._names]
        self.shapes, self.groups = ((image_size, image_size),), None
        if buckets:
            possible = bucket_shapes(image_size)
            nearest = [nearest_bucket(headers[name].value, possible) for name in self._names]
            used, self.groups = np.unique(np.array(nearest, np.int32), return_inverse=True)
            self.shapes = tuple(possible[i] for i in used)
        self._replacements = Replacements(self._root, self._labels, self.left_out, self._raise)
        _say(self._root, split, self._messages(listing, faults, lost, usable))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        size = self.shapes[0 if self.groups is None else self.groups[index]]
        read = partial(self._read, size=size)
        at, (fitted, shape) = self._replacements.read(index, read, self._shown_at)
        return picture_entries(fitted, shape, self._background) | self._describe(at)

    def describe(self, index: int) -> dict[str, Any]:
        """The example without the entries made from its pixels: nothing is read."""
        index = range(len(self))[index]
        return self._describe(self._replacements[index])

    def _describe(self, index: int) -> dict[str, Any]:
        return {
            "caption": self._captions[index],
            "label": self._labels[index],
            "name": printable(self._names[index]),
            "path": self._path(index),
        } | self._annotated(self._names[index], self._captions[index])

    def _annotated(self, name: str, caption: str) -> dict[str, Any]:
        """The entries of the annotations."""
        if self._annotations is None:
            return {}
        entries: dict[str, Any] = {"captions": self._annotations.captions.get(name, (caption,))}
        if self._annotations.boxes is not None:
            none = np.zeros(0, np.int32), np.zeros((0, 4), np.float32)
            found = self._annotations.boxes.get(name, none)
            entries |= dict(zip(("categories", "boxes"), found, strict=True))
        return entries

    def _path(self, index: int) -> str:
        return os.path.join(self._root, self._names[index])

    def _shown(self, name: str) -> str:
        return printable(os.path.join(self._root, name))

    def _read(self, index: int, size: Shape) -> tuple[np.ndarray, Shape]:
        return read_fitted(self._path(index), size)

    def _shown_at(self, index: int) -> str:
        return self._shown(self._names[index])

    def _nothing_usable(self, skipped: int) -> str:
        root = printable(self._root)
        if not skipped:
            wanted = ", ".join(EXTENSIONS)
            return f"{root} holds no picture; looked in all sub-folders for {wanted}"
        reasons = "; ".join(f"{count}: {reason}" for reason, count in self.left_out.items())
        return f"{root}: none of its {skipped} pictures is usable ({reasons})"

    def _messages(
        self,
        listing: Listing,
        faults: dict[str, str],
        lost: dict[str, list[str]],
        usable: list[str],
    ) -> list[str]:
        """The warnings about the folder."""
        root = printable(self._root)
        messages = [
            f"skipped {self._shown(name)}: {fault}"
            for name, fault in list(faults.items())[:MAX_WARNINGS]
        ]
        for link, folder in list(listing.repeated.items())[:MAX_LOST]:
            where = f"{self._shown(folder)}, which is read already" if folder else "a folder above"
            messages.append(f"{self._shown(link)} is not entered: it leads to {where}")
        for reason, lines in lost.items():
            messages += lines[:MAX_LOST]
            messages.append(f"{root}: {len(lines)} captions lost: {reason}")
        strange = [name for name in usable if not is_utf8(name)]
        if strange:
            messages.append(
                f"{root}: {len(strange)} names are not UTF-8, such as {printable(strange[0])}; "
                "they are kept under this name, and a class of this kind gives no caption"
            )
        if faults:
            messages.append(
                f"{root}: skipped {len(faults)} of {len(faults) + len(usable)} pictures"
            )
        return messages


def _pictures(listing: Listing) -> dict[str, File]:
    """The files with the name of a picture."""
    found = {name: file for name, file in listing.files.items() if _is_picture(name)}
    stems = {name.rpartition(".")[0] for name in found}

    def about_another(name: str) -> bool:
        stem, dot, kind = name.rpartition(".")[0].rpartition(".")
        return dot + kind.lower() in ABOUT_ANOTHER and stem in stems

    return {name: file for name, file in found.items() if not about_another(name)}


def _faults(listing: Listing, headers: dict[str, Finding], min_size: int) -> dict[str, str]:
    """The reasons why files cannot be used, by name, sorted."""
    faults = {
        name: fault
        for name, fault in listing.faults.items()
        if name.endswith("/") or not name or _is_picture(name)
    }
    for name, header in headers.items():
        if header.fault:
            faults[name] = header.fault
        elif min(header.value) < min_size:
            height, width = header.value
            size = f"{width}x{height} pixels"
            faults[name] = f"{size}, the short side is under min_size={min_size}"
    return dict(sorted(faults.items()))


def _read_header(file: File) -> tuple[tuple[int, int] | None, str]:
    """(height, width) of a picture, or None and the reason; for `index.examine`."""
    if file.size == 0:
        return None, "the file is empty (0 bytes)"
    extension = _extension(file.path)
    if not _readable(extension):
        return None, f"the installed Pillow cannot read .{extension} files"
    try:
        return read_shape(file.path), ""
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the storage's fault, not the file's
        return None, fault_of(error)


@cache
def _readable(extension: str) -> bool:
    Image.init()
    codec = CODECS.get(extension)
    known = f".{extension}" in Image.registered_extensions()
    return known and (codec is None or bool(features.check(codec)))


def _extension(name: str) -> str:
    _, dot, extension = name.rpartition(".")
    return extension.lower() if dot else ""


def _is_picture(name: str) -> bool:
    return _extension(name) in _ALL_EXTENSIONS


def _class_of(name: str) -> str:
    return name.split("/")[0] if "/" in name else ""


def _class_caption(name: str) -> str:
    return _class_of(name) if is_utf8(_class_of(name)) else ""


_SAID: dict[str, tuple[list[str], str]] = {}


def _say(root: str, split: str, messages: list[str]) -> None:
    """Logs the warnings; those that another split of the folder has logged are not repeated."""
    said, by = _SAID.get(root, ([], split))
    if said == messages and by != split:
        return
    _SAID[root] = messages, split
    for message in messages:
        log.warning("%s", message)
