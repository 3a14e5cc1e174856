"""Captions and boxes of a folder of pictures from files in COCO's format (Lin et al. 2014).

A file is an object with `images` ({"id", "file_name"}) and `annotations` ({"image_id", and
"caption" or "bbox" and "category_id"}), and for boxes `categories` ({"id", "name"}):
`captions_train2017.json`, `instances_train2017.json`.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.data.captions import make_finder
from ldm_jax.data.text_files import printable

EXPECTED = 'expected COCO\'s format, {"images": [...], "annotations": [...]}'


class Annotations(NamedTuple):
    """What files say of the pictures of a folder.

    Attributes:
      captions: by picture, one or several.
      boxes: by picture, categories int32 (N,), and boxes float32 (N, 4), (left, top, width, height)
        in pixels of the file; None if no file has boxes.
      categories: their names; a category is an index into them, by ascending `id` in the files.
      absent: a message for each annotated picture that the folder has not.
    """

    captions: dict[str, tuple[str, ...]]
    boxes: dict[str, tuple[np.ndarray, np.ndarray]] | None
    categories: tuple[str, ...]
    absent: list[str]


def read_annotations(paths: Sequence[str], pictures: Iterable[str]) -> Annotations:
    """Reads COCO files on `pictures`, names relative to their folder.

    Boxes of crowds (`iscrowd`) are left out, and those without width or height.

    Raises:
      FileNotFoundError: a file does not exist.
      ValueError: a file has another format, or files disagree on a category.
    """
    captions: dict[str, list[str]] = defaultdict(list)
    objects: dict[str, list[tuple[int, list[float]]]] = defaultdict(list)
    names: dict[int, str] = {}
    absent: list[str] = []
    find, with_boxes = make_finder(pictures), False
    for path in map(os.path.expanduser, paths):
        shown = printable(path)
        content = _read(path)
        try:
            files = {entry["id"]: entry["file_name"] for entry in content["images"]}
            matches = {number: find(name) for number, name in files.items()}
            found = {number: match[0] for number, match in matches.items() if len(match) == 1}
            own = {int(entry["id"]): entry["name"] for entry in content.get("categories", ())}
            if not all("caption" in entry or "bbox" in entry for entry in content["annotations"]):
                raise ValueError("an annotation has neither a caption nor a bbox")
            for entry in content["annotations"]:
                picture = found.get(entry["image_id"])
                if "caption" in entry and picture:
                    captions[picture].append(" ".join(entry["caption"].split()))
                if "bbox" in entry:
                    with_boxes, category = True, int(entry["category_id"])
                    left, top, width, height = map(float, entry["bbox"])
                    if own and category not in own:
                        raise ValueError(f"no category has the id {category}")
                    own.setdefault(category, str(category))
                    if picture and width > 0 and height > 0 and not entry.get("iscrowd"):
                        objects[picture].append((category, [left, top, width, height]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{shown}: {EXPECTED} ({error!r})") from error
        absent += [
            f"{shown} names {printable(str(name))}, which is not there"
            for number, name in files.items()
            if number not in found
        ]
        for category, name in own.items():
            if names.setdefault(category, name) != name:
                raise ValueError(
                    f"{shown}: category {category} is {name!r}, but {names[category]!r} in a file "
                    "before it"
                )
    places = {category: place for place, category in enumerate(sorted(names))}
    boxes = {
        picture: (
            np.array([places[category] for category, _ in found], np.int32),
            np.array([box for _, box in found], np.float32).reshape(-1, 4),
        )
        for picture, found in objects.items()
    }
    return Annotations(
        captions={picture: tuple(texts) for picture, texts in captions.items()},
        boxes=boxes if with_boxes else None,
        categories=tuple(names[category] for category in sorted(names)),
        absent=absent,
    )


def _read(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"data.annotations: {printable(path)!r} is not a file")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:
        raise ValueError(f"{printable(path)}: {EXPECTED} ({error})") from error
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise ValueError(f"{printable(path)}: {EXPECTED}")
    return content
