"""The embedded emoji: pictures with transparency, with names and groups."""

import io
import json
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_jax.data.images import WHITE, Colour, fit, picture_entries
from ldm_jax.data.splits import check_split, in_split

EMOJI_ZIP = Path(__file__).parent / "emoji.zip"
EMOJI_SIZE = 64
EMOJI_COLUMNS = 44


@cache
def read_emoji() -> tuple[tuple[str, ...], list[dict], np.ndarray]:
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
        check_split(split)
        self.classes, records, _ = read_emoji()
        # Places and not pictures, which would be sent to every worker process.
        self._places = [
            i for i, record in enumerate(records) if in_split(record["held_out"], split)
        ]
        self.left_out: dict[str, int] = {}
        self.lost_captions: dict[str, int] = {}
        self._size, self._background = image_size, tuple(background)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = read_emoji()[2][self._places[index]]
        fitted = fit(image, (self._size, self._size))
        entries = picture_entries(fitted, image.shape[:2], self._background)
        return entries | self.describe(index)

    def describe(self, index: int) -> dict[str, Any]:
        record = read_emoji()[1][self._places[index]]
        return {
            "caption": record["name"],
            "label": record["group"],
            "name": record["name"],
            "tags": tuple(record["tags"]),
        }
