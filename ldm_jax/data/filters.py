"""Which pictures of a data set are prepared, and the record that is made of each."""

import io
from dataclasses import dataclass
from hashlib import blake2b
from operator import gt, lt
from typing import Any, NamedTuple

from ldm_jax.data.data_sets import SCORES, SIZES, Item, about_of
from ldm_jax.data.faults import fault_of
from ldm_jax.data.images import read_fitted, read_shape
from ldm_jax.data.shards import pack


@dataclass(frozen=True)
class Options:
    """What determines the shards of a data set; the fields are flags of `ldm_jax.prepare`.

    A record without a score that a filter needs is dropped, and counted on its own.

    Attributes:
      image_size: of the squares, pixels.
      min_size: of the short side of a file, pixels; 0: `image_size // 2`, as in training.
      max_watermark, max_unsafe: largest probabilities; None: no filter.
      min_aesthetic: lowest score; None: no filter.
      encoding: of the pictures, one of `shards.ENCODINGS`.
      shard_size: number of records.
      kind: of the data set, see `open_data_set`.
      image_column, caption_column, label_column: see `Columns`.
    """

    image_size: int
    min_size: int = 0
    max_watermark: float | None = None
    max_unsafe: float | None = None
    min_aesthetic: float | None = None
    encoding: str = "webp"
    shard_size: int = 1000
    kind: str = "auto"
    image_column: str = ""
    caption_column: str = ""
    label_column: str = ""


class Result(NamedTuple):
    """What became of an item: a record, or a fault; `digest` is that of its pixels."""

    name: str
    fault: str = ""
    lost: str = ""
    record: bytes = b""
    digest: str = ""
    caption: str = ""
    label: str = ""


def prepare_item(item: Item, options: Options) -> Result:
    """Makes the record of an item, or says why it has none.

    Raises:
      OSError: the storage fails.
    """
    try:
        return _record(item, options)
    except Exception as error:  # Pillow's are of many kinds: OSError, SyntaxError, struct.error
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the storage's fault, not the file's
        return Result(item.name, fault_of(error), item.lost)


def _record(item: Item, options: Options) -> Result:
    """The record of an item; raises ValueError with the reason why it has none."""
    if item.fault:
        raise ValueError(item.fault)
    about = about_of(item)
    scores = _scores(about)
    _check_scores(scores, options)

    def file() -> str | io.BytesIO:
        return item.picture if isinstance(item.picture, str) else io.BytesIO(item.picture)

    height, width = read_shape(file())
    min_size = options.min_size or options.image_size // 2
    if min(height, width) < min_size:
        raise ValueError(f"{width}x{height} pixels, the short side is under min_size={min_size}")
    square, shape = read_fitted(file(), (options.image_size,) * 2)
    captions = list(item.captions) or [item.label] * bool(item.label)
    known = {"name": item.name, "captions": captions, "class": item.label, "scores": scores}
    return Result(
        item.name,
        lost=item.lost,
        record=pack(square, _original(about, shape), options.encoding, known),
        digest=blake2b(square.tobytes(), digest_size=16).hexdigest(),
        caption=captions[0] if captions else "",
        label=item.label,
    )


def _scores(about: dict[str, Any]) -> dict[str, float]:
    found = {
        score: next((about[key] for key in keys if about.get(key) is not None), None)
        for score, keys in SCORES.items()
    }
    # NaN, which is not equal to itself, is what pandas writes for no score.
    return {k: float(v) for k, v in found.items() if isinstance(v, (int, float)) and v == v}


def _check_scores(scores: dict[str, float], options: Options) -> None:
    limits = {
        "watermark": (options.max_watermark, gt),
        "unsafe": (options.max_unsafe, gt),
        "aesthetic": (options.min_aesthetic, lt),
    }
    for score, (limit, beyond) in limits.items():
        if limit is None:
            continue
        if score not in scores:
            raise ValueError(f"no {score} score")
        if beyond(scores[score], limit):
            raise ValueError(
                f"the {score} score is {'over' if beyond is gt else 'under'} {limit:g}"
            )


def _original(about: dict[str, Any], shape: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the file before the data set's maker resized it, where that is known.

    Sizes of another aspect ratio are those of a file that was also cropped or turned: then it is
    `shape`, that of the file here.
    """
    height, width = shape
    for keys in SIZES:
        given = [about.get(key) for key in keys]
        if all(isinstance(v, (int, float)) and v > 0 for v in given):
            h, w = map(int, given)
            if abs(h * width - w * height) <= h + w:  # each side was rounded by up to a pixel
                return h, w
    return height, width
