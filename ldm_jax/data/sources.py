"""Where pictures come from: the embedded emoji, scenes of them, a folder, prepared shards, a
TensorFlow data set.

A source is a random-access sequence of examples, each a dict:

- `image`: uint8 (size, size, 3);
- `placement`: the `Placement` of the picture in the file it was made of;
- `caption`: str, "" if there is none;
- `label`: int, an index into `source.classes`;
- `name`: str, unique in the source;
- `rgba`: uint8 (size, size, 4) and `background`: the colour on which `image` is composited; only if
  the picture has transparency;
- `tags`: tuple of str, other words for the picture; only from the emoji source;
- `captions`: tuple of str, and `categories` and `boxes`; only from a folder with annotations;
- `path`: str, absolute, of the picture's file; only from a folder;
- `boxes`, `categories`, `masks`, `segmentation`: what `scenes` knows of its pictures.

Reading an example twice gives the same example; all randomness is in `transforms`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ldm_jax.data.emoji import EmojiSource
from ldm_jax.data.folder import FolderSource
from ldm_jax.data.images import WHITE, Colour, fit, picture_entries
from ldm_jax.data.mixture import Mixture
from ldm_jax.data.scenes import SceneSource
from ldm_jax.data.shards import ShardSource
from ldm_jax.data.splits import check_split


class Source(Protocol):
    """A random-access sequence of examples; see the module's docstring.

    Attributes:
      classes: their names.
      left_out: how many pictures were found but cannot be used, by reason.
      lost_captions: how many captions were found but cannot be used, by reason.
      endless: optional; True where examples are made up, each by its index alone: they need no
        shuffling, and are too many to look at all of them.
      groups: optional; int (N,), or None: only examples of one group are in a batch together.
      latents: optional; True where examples have `moments`: `latent_shards`, `moment_tars`.
      on_disk: optional; True where `describe` reads from the disk, for more examples than can be
        looked at.
    """

    classes: tuple[str, ...]
    left_out: dict[str, int]
    lost_captions: dict[str, int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def describe(self, index: int) -> dict[str, Any]:
        """The example without its pixels and what belongs to them: nothing is decoded or drawn."""
        ...


class TfdsSource:
    """A TensorFlow data set with the features "image" and, if labelled, "label".

    The caption is the name of the class. The held-out split is the data set's own "test" or
    "validation" split; if it has neither, the last `held_out` of "train", or nothing if that would
    be all of it. A data set that is not on disk is downloaded.

    Raises:
      ImportError: tensorflow-datasets is not installed.
      ValueError: there is no such data set, or it has no pictures.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        image_size: int = 256,
        background: Colour = WHITE,
        held_out: float = 0.1,
    ):
        check_split(split)
        try:
            import tensorflow_datasets as tfds  # heavy, and few need it
        except ImportError as error:
            raise ImportError(
                f"data.source=tfds: {error}; pip install -r requirements.txt"
            ) from error

        try:
            # Only ArrayRecord gives random access.
            builder = tfds.builder(path, file_format="array_record")
        except (ValueError, AssertionError) as error:  # set or configuration; version
            raise ValueError(
                f"data.path {path!r} is no data set of TensorFlow Datasets; "
                "https://www.tensorflow.org/datasets/catalog lists them"
            ) from error
        features = builder.info.features
        if "image" not in features:
            raise ValueError(f'{path} has the features {sorted(features)}, no "image"')
        builder.download_and_prepare()
        chosen = _tfds_split(builder.info.splits, split, held_out)
        self._data = self._records = ()
        if chosen:
            self._data = builder.as_data_source(chosen)
            undecoded = {"image": tfds.decode.SkipDecoding()}
            self._records = builder.as_data_source(chosen, decoders=undecoded)
        self._labelled = "label" in features
        self.classes = tuple(features["label"].names) if self._labelled else ("",)
        self.left_out: dict[str, int] = {}
        self.lost_captions: dict[str, int] = {}
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
        fitted = fit(image, (self._size, self._size))
        entries = picture_entries(fitted, image.shape[:2], self._background)
        return entries | self._describe(record, index)

    def describe(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        return self._describe(self._records[index], index)

    def _describe(self, record: dict[str, Any], index: int) -> dict[str, Any]:
        label = int(record["label"]) if self._labelled else 0
        return {
            "caption": self.classes[label],
            "label": label,
            "name": f"{self._prefix}/{index}",
        }


def _tfds_split(available: Any, split: str, held_out: float) -> str:
    """Our "train", "held_out" or "all" in the notation of tfds, from a data set's splits.

    "" if it is empty.
    """
    own = next((name for name in ("test", "validation") if name in available), None)
    if own:
        return {"train": "train", "held_out": own, "all": f"train+{own}"}[split]
    count = available["train"].num_examples
    kept = round((1 - held_out) * count) or count
    rest = f"train[{kept}:]" if kept < count else ""
    return {"train": f"train[:{kept}]", "held_out": rest, "all": "train"}[split]


class Subset:
    """The examples of a source at `indices`, which may be none; labels and classes stay.

    `left_out` and `lost_captions` are those of the source.
    """

    def __init__(self, source: Source, indices: Sequence[int]):
        self.classes, self._source, self._indices = source.classes, source, indices
        self.left_out, self.lost_captions = source.left_out, source.lost_captions
        self.shapes, groups = getattr(source, "shapes", ()), getattr(source, "groups", None)
        self.groups = None if groups is None else groups[np.asarray(indices, int)]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[self._indices[index]]

    def describe(self, index: int) -> dict[str, Any]:
        return self._source.describe(self._indices[index])


def of_classes(source: Source, wanted: Sequence[str]) -> Subset:
    """The examples whose class is one of `wanted`.

    Raises:
      ValueError: the source has no such class; lists those it has.
    """
    unknown = [name for name in wanted if name not in source.classes]
    if unknown:
        raise ValueError(f"no class {unknown[0]!r}; this source has {list(source.classes)}")
    labels = {source.classes.index(name) for name in wanted}
    indices = [i for i in range(len(source)) if source.describe(i)["label"] in labels]
    return Subset(source, indices)


def sample(source: Source, count: int = 10_000) -> Source:
    """The source itself, or the first `count` examples of one that is too long to look at."""
    long = getattr(source, "endless", False) or getattr(source, "on_disk", False)
    if long and len(source) > count:
        return Subset(source, range(count))
    return source


SOURCES = ("emoji", "scenes", "folder", "shards", "tfds")
# Those that `data.path` names.
WITH_PATH = ("folder", "shards", "tfds")


def open_source(config: Any, split: str = "train", index: str | Path | None = None) -> Source:
    """Opens the source that the `data` section of a configuration describes.

    A split may be empty, but "train" is not: examples that would all be held out, of the source or
    of `classes`, are in "train" and none in "held_out".

    Args:
      config: ConfigDict with `source`, one of SOURCES or several in turn ("scenes+emoji", a
        `Mixture`), `image_size`, and optionally `path` (a folder, of pictures or of shards, or the
        name of a TensorFlow data set), `background` (what transparent pixels are composited on,
        white), `held_out` (0.1; the emoji's is fixed), `on_error` ("skip"; folders and shards),
        `min_size` (folders), `scenes` (see `scene_options`), `classes` (only these; all if empty).
      split: "train", "held_out" or "all".
      index: the file that stores the findings in a folder between starts; None: no file.

    Raises:
      ValueError: unknown source or split, no path, or a source without usable pictures.
    """
    names = config.source.split("+")
    if config.get("buckets") and config.source != "folder":
        raise ValueError(
            f"data.buckets: pictures of data.source={config.source!r} are square; only a folder's "
            "can have several shapes"
        )
    if len(names) > 1:
        return _mixture(config, names, split, index)
    source = _open(config, split, index)
    wanted = config.get("classes")
    if not wanted:
        return source
    if getattr(source, "endless", False):
        raise ValueError(
            f"data.classes={tuple(wanted)}: of data.source={config.source!r} choose the kinds with "
            "data.scenes.names or data.scenes.kinds"
        )
    subset = of_classes(source, wanted)
    if split == "train" and not len(subset):
        return of_classes(_open(config, "all", index), wanted)
    if split == "held_out" and not len(of_classes(_open(config, "train", index), wanted)):
        return Subset(source, ())
    return subset


def _mixture(config: Any, names: Sequence[str], split: str, index: str | Path | None) -> Source:
    """The sources `names` in turn; an empty split of one is left out of the held-out pictures."""
    if config.get("classes"):
        raise ValueError(
            f"data.classes={tuple(config.classes)}: choose classes of a single data.source, not "
            f"of {config.source!r}"
        )
    opened = []
    for name in names:
        alone = config.copy_and_resolve_references()
        alone.source = name
        opened.append(_open(alone, split, index))
    return Mixture([source for source in opened if len(source)] or opened)


def _open(config: Any, split: str, index: str | Path | None) -> Source:
    common = {"image_size": config.image_size, "background": config.get("background", WHITE)}
    fraction = config.get("held_out", 0.1)
    if config.get("annotations") and config.source != "folder":
        raise ValueError(
            f"data.annotations: data.source={config.source!r} has its own; they are for a folder"
        )
    if config.source in WITH_PATH and not config.get("path"):
        raise ValueError(f"data.source={config.source!r} needs data.path")
    match config.source:
        case "emoji":
            return EmojiSource(split, **common)
        case "scenes":
            options = config.get("scenes", {})
            return SceneSource(split, config.image_size, dict(options), fraction)
        case "folder":
            return FolderSource(
                config.path,
                split,
                held_out=fraction,
                on_error=config.get("on_error", "skip"),
                min_size=config.get("min_size", 0),
                index=index,
                buckets=config.get("buckets", False) and split == "train",
                annotations=tuple(config.get("annotations", ())),
                **common,
            )
        case "shards":
            on_error = config.get("on_error", "skip")
            return ShardSource(config.path, split, held_out=fraction, on_error=on_error, **common)
        case "tfds":
            return TfdsSource(config.path, split, held_out=fraction, **common)
    raise ValueError(f"unknown data.source {config.source!r}; choose one of {', '.join(SOURCES)}")
