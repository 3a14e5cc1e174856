"""Where pictures come from: the embedded emoji, a folder, a TensorFlow data set.

A source is a random-access sequence of examples, each a dict:

- `image`: uint8 (size, size, 3);
- `caption`: str, "" where there is none;
- `label`: int, an index into `source.classes`;
- `name`: str, unique in the source;
- `rgba`: uint8 (size, size, 4) and `background`: the colour `image` is composited on; only where
  the picture has transparency;
- `tags`: tuple of str, other words for the picture; only from the emoji source.

Reading an example twice gives the same example: what is random lives in `transforms`.
"""

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from ldm_jax.data.images import composite, fit_square, read_image

log = logging.getLogger(__name__)

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
SPLITS = ("train", "held_out", "all")

EMOJI_ZIP = Path(__file__).parent / "emoji.zip"
EMOJI_SIZE = 64
EMOJI_COLUMNS = 44

EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
MAX_WARNINGS = 10


class Source(Protocol):
    """A random-access sequence of examples; see the module's docstring."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the example `name` is held out: a fixed `fraction` of all names, by SHA-256."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def in_split(held_out: bool, split: str) -> bool:
    """Whether an example belongs to `split`, one of "train", "held_out", "all"."""
    return split == "all" or held_out == (split == "held_out")


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")


def _pixels(image: np.ndarray, size: int, background: Colour) -> dict[str, Any]:
    """The keys of an example that come from its picture, uint8 (H, W, 3 or 4)."""
    image = fit_square(image, size)
    if image.shape[-1] == 3:
        return {"image": image}
    return {"image": composite(image, background), "rgba": image, "background": background}


@cache
def _read_emoji() -> tuple[tuple[str, ...], list[dict], np.ndarray]:
    """Groups, records and pictures uint8 (N, 64, 64, 4) of the embedded data, decoded once."""
    with zipfile.ZipFile(EMOJI_ZIP) as pack:
        index = json.loads(pack.read("emoji.json"))
        sheet = np.asarray(Image.open(io.BytesIO(pack.read("sheet.webp"))))
    tiles = sheet.reshape(-1, EMOJI_SIZE, EMOJI_COLUMNS, EMOJI_SIZE, 4).swapaxes(1, 2)
    tiles = tiles.reshape(-1, EMOJI_SIZE, EMOJI_SIZE, 4)[: len(index["emoji"])]
    return tuple(index["groups"]), index["emoji"], tiles


class EmojiSource:
    """1,906 Noto emoji, 64 px, captioned by their CLDR names ("red apple"), classed by CLDR group.

    The held-out tenth is fixed in the file. `scripts/pack_emoji.py` says where all comes from.
    """

    def __init__(
        self, split: str = "train", image_size: int = EMOJI_SIZE, background: Colour = WHITE
    ):
        _check_split(split)
        self.classes, records, images = _read_emoji()
        kept = [i for i, record in enumerate(records) if in_split(record["held_out"], split)]
        self._records = [records[i] for i in kept]
        self._images = images[kept]
        self._size, self._background = image_size, tuple(background)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        example = _pixels(self._images[index], self._size, self._background)
        example |= {"caption": record["name"], "label": record["group"], "name": record["name"]}
        return example | {"tags": tuple(record["tags"])}


class FolderSource:
    """Every picture under a folder.

    - class: the first sub-folder (`root/CLASS/.../picture.jpg`), "" for a picture in the root
      itself; the sorted classes are the same in every split;
    - caption: the text of `picture.txt` beside it; else its line in a `metadata.jsonl`, of its own
      folder or any above (`{"file_name": "picture.jpg", "text": "..."}`, or "caption"); else the
      class; else "";
    - held-out: a fixed fraction, by the hash of the path relative to the folder;
    - each picture is resized on its short side and centre-cropped to `image_size`.

    Opening decodes every file once, in threads. One that is broken or too small (short side under
    `min_size`, default `image_size // 2`: beyond twofold magnification there is only blur) is
    skipped with a warning that names it, or raised with `on_error="raise"`. Pictures are decoded
    when read and not kept.

    Raises:
      FileNotFoundError: the folder does not exist.
      ValueError: it has no usable picture (in this split), a file is bad under `on_error="raise"`,
        or a metadata.jsonl is malformed.
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
    ):
        _check_split(split)
        if on_error not in ("skip", "raise"):
            raise ValueError(f'unknown on_error {on_error!r}; choose "skip" or "raise"')
        self._root = Path(path)
        self._size, self._background = image_size, tuple(background)
        found = _find_images(self._root)
        self.classes = tuple(sorted({_class_of(name) for name in found}))
        usable = _usable(self._root, found, min_size or image_size // 2, on_error)
        self._names = [n for n in usable if in_split(is_held_out(n, held_out), split)]
        if not self._names:
            raise ValueError(
                f"{self._root}: none of its {len(found)} pictures is left for the split {split!r} "
                f"({len(usable)} are usable; held_out={held_out})"
            )
        self._metadata = _read_metadata(self._root)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self._names[index]
        example = _pixels(read_image(self._root / name), self._size, self._background)
        label = self.classes.index(_class_of(name))
        return example | {"caption": self._caption(name), "label": label, "name": name}

    def _caption(self, name: str) -> str:
        beside = (self._root / name).with_suffix(".txt")
        if beside.is_file():
            return beside.read_text(encoding="utf-8").strip()
        return self._metadata.get(name, _class_of(name))


def _class_of(name: str) -> str:
    return name.split("/")[0] if "/" in name else ""


def _find_images(root: Path) -> list[str]:
    """Sorted paths, relative and with "/", of the pictures under `root`, without hidden ones."""
    if not root.is_dir():
        raise FileNotFoundError(f"data.path {str(root)!r} is not a folder")
    relative = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    names = sorted(
        path.as_posix()
        for path in relative
        if path.suffix[1:].lower() in EXTENSIONS and not any(p.startswith(".") for p in path.parts)
    )
    if not names:
        wanted = ", ".join(EXTENSIONS)
        raise ValueError(f"{root} holds no picture; looked in all sub-folders for {wanted}")
    return names


def _fault(path: Path, min_size: int) -> str:
    """Why a file cannot be used, "" if it can."""
    if path.stat().st_size == 0:
        return "the file is empty (0 bytes)"
    try:
        height, width = read_image(path).shape[:2]
    except UnidentifiedImageError:
        return "not a picture that Pillow can read"
    except Exception as error:  # of many kinds: OSError, SyntaxError, struct.error, ...
        return f"{type(error).__name__}: {error}"
    if min(height, width) < min_size:
        return f"{width}x{height} pixels, the short side is under min_size={min_size}"
    return ""


def _usable(root: Path, names: Sequence[str], min_size: int, on_error: str) -> list[str]:
    with ThreadPoolExecutor() as pool:
        faults = list(pool.map(lambda name: _fault(root / name, min_size), names))
    bad = [(name, fault) for name, fault in zip(names, faults, strict=True) if fault]
    if bad and on_error == "raise":
        raise ValueError(f"{root / bad[0][0]}: {bad[0][1]}")
    for name, fault in bad[:MAX_WARNINGS]:
        log.warning("skipped %s: %s", root / name, fault)
    if bad:
        log.warning("%s: skipped %d of %d pictures", root, len(bad), len(names))
    return [name for name, fault in zip(names, faults, strict=True) if not fault]


def _read_metadata(root: Path) -> dict[str, str]:
    """Captions of all metadata.jsonl under `root`, by path relative to it; the deepest wins."""
    captions = {}
    for file in sorted(root.rglob("metadata.jsonl"), key=lambda f: len(f.parts)):
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                text = entry["text"] if "text" in entry else entry["caption"]
                name = (file.parent / entry["file_name"]).relative_to(root).as_posix()
                captions[name] = text.strip()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                expected = '{"file_name": ..., "text": ...}'
                raise ValueError(
                    f"{file}:{number}: expected {expected}, got {line[:80]!r}"
                ) from error
    return captions


class TfdsSource:
    """A TensorFlow data set with the features "image" and, if labelled, "label".

    The caption is the name of the class. The held-out split is the set's own "test" or
    "validation" split; where it has neither, the last `held_out` of "train". A set that is not on
    disk is downloaded.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        image_size: int = 256,
        background: Colour = WHITE,
        held_out: float = 0.1,
    ):
        _check_split(split)
        try:
            import tensorflow_datasets as tfds  # heavy, and few need it
        except ImportError as error:
            raise ImportError(f'data.source=tfds: {error}; pip install ".[tfds]"') from error

        # Only ArrayRecord gives random access.
        builder = tfds.builder(path, file_format="array_record")
        if "image" not in builder.info.features:
            raise ValueError(f'{path} has the features {sorted(builder.info.features)}, no "image"')
        builder.download_and_prepare()
        self._data = builder.as_data_source(_tfds_split(builder.info.splits, split, held_out))
        self._labelled = "label" in builder.info.features
        self.classes = tuple(builder.info.features["label"].names) if self._labelled else ("",)
        self._size, self._background = image_size, tuple(background)
        self._prefix = f"{path}/{split}"

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]  # IndexError beyond the end, as iteration needs
        record = self._data[index]
        image = np.asarray(record["image"])
        if image.shape[-1] == 1:
            image = np.repeat(image, 3, axis=-1)
        label = int(record["label"]) if self._labelled else 0
        example = _pixels(image, self._size, self._background)
        name = f"{self._prefix}/{index}"
        return example | {"caption": self.classes[label], "label": label, "name": name}


def _tfds_split(available: Sequence[str], split: str, held_out: float) -> str:
    """Our "train", "held_out" or "all" in the notation of tfds, from the splits a set has."""
    own = next((name for name in ("test", "validation") if name in available), None)
    percent = round(100 * (1 - held_out))
    train, rest = ("train", own) if own else (f"train[:{percent}%]", f"train[{percent}%:]")
    return {"train": train, "held_out": rest, "all": f"{train}+{rest}"}[split]


class Subset:
    """The examples of a source whose class is one of `wanted`; labels and classes stay.

    Raises:
      ValueError: the source has no such class; lists those it has.
    """

    def __init__(self, source: Source, wanted: Sequence[str]):
        unknown = [name for name in wanted if name not in source.classes]
        if unknown:
            raise ValueError(f"no class {unknown[0]!r}; this source has {list(source.classes)}")
        self.classes, self._source = source.classes, source
        labels = {source.classes.index(name) for name in wanted}
        self._indices = [i for i in range(len(source)) if source[i]["label"] in labels]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[self._indices[index]]


SOURCES = ("emoji", "folder", "tfds")


def open_source(config: Any, split: str = "train") -> Source:
    """Opens the source that the `data` section of a configuration describes.

    Args:
      config: ConfigDict with `source`, one of SOURCES, `image_size`, and optionally `path` (a
        folder or the name of a TensorFlow data set), `background` (what transparent pixels are
        composited on, white), `held_out` (0.1; the emoji's is fixed), `on_error` ("skip") and
        `min_size` (folders), `classes` (only these; all if empty).
      split: "train", "held_out" or "all".

    Raises:
      ValueError: unknown source or split, no path, or a source without usable pictures.
    """
    source = _open(config, split)
    return Subset(source, config.classes) if config.get("classes") else source


def _open(config: Any, split: str) -> Source:
    common = {"image_size": config.image_size, "background": config.get("background", WHITE)}
    fraction = config.get("held_out", 0.1)
    if config.source in ("folder", "tfds") and not config.get("path"):
        raise ValueError(f"data.source={config.source!r} needs data.path")
    match config.source:
        case "emoji":
            return EmojiSource(split, **common)
        case "folder":
            return FolderSource(
                config.path,
                split,
                held_out=fraction,
                on_error=config.get("on_error", "skip"),
                min_size=config.get("min_size", 0),
                **common,
            )
        case "tfds":
            return TfdsSource(config.path, split, held_out=fraction, **common)
    raise ValueError(f"unknown data.source {config.source!r}; choose one of {', '.join(SOURCES)}")
