"""Conditions of a drawing from files: a segmentation, boxes, a small picture, a hint."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from ldm_jax.conditions.base import Embedder
from ldm_jax.data.condition_kinds import Boxes
from ldm_jax.data.images import composite, read_image
from ldm_jax.data.placement import Placement
from ldm_jax.pictures import to_signed
from ldm_jax.pipeline import Pipeline

# Flags of `sample.py` and the entries of a model that they give.
ENTRIES = {
    "segmentation": "segmentation",
    "layout": "boxes",
    "low_resolution": "low_resolution",
    "hint": "control",
}


def condition_arguments(
    pipe: Pipeline,
    files: Mapping[str, str],
    height: int | None,
    width: int | None,
    hints: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """The arguments `conditions`, `height` and `width` for `pipe`, from files by their flag, and
    from the hints of ControlNets by their names.

    - segmentation: a grey or palette picture whose values are classes. Its size is that of the
      drawing.
    - layout: a JSON list of {"category_id": 0, "bbox": [left, top, width, height]}, in pixels of
      the drawing.
    - low_resolution: a picture; the drawing is as many times as large as the model enlarges.
    - hint: a picture, such as edges, of the size of the drawing.

    Raises:
      ValueError: the model is not told this, a file is not what it should be, or a size is asked
        for that does not fit it.
    """
    given = [(flag, ENTRIES[flag], path) for flag, path in files.items()]
    given += [("hint", name, path) for name, path in hints.items()]
    if not given:
        return {}
    embedders = {embedder.name: embedder for embedder in pipe.model.embedders}
    made: dict[str, Any] = {}
    size = (height, width)
    for flag, name, path in given:
        if name not in embedders:
            takes = [f"--{f}" for f, entry in ENTRIES.items() if entry in embedders]
            raise ValueError(
                f"--{flag}: this model is not told {name}; of such files it takes "
                f"{', '.join(takes) or 'none'}"
            )
        made[name], own = _READ[flag](Path(path), embedders[name], pipe, size)
        for side, asked, given in zip(("height", "width"), size, own, strict=True):
            if asked not in (None, given):
                raise ValueError(f"{path} asks for a drawing of {side} {given}, not {asked}")
        size = own
    return {"conditions": made, "height": size[0], "width": size[1]}


Size = tuple[int | None, int | None]  # (height, width) that the caller asks for
Read = tuple[np.ndarray, tuple[int, int]]  # the entry, and the size that it is for


def _segmentation(path: Path, embedder: Embedder, pipe: Pipeline, size: Size) -> Read:
    with Image.open(path) as file:
        labels = np.asarray(file)
    if labels.ndim != 2:
        raise ValueError(f"{path} has {labels.shape[-1]} channels: expected a grey or palette one")
    classes = embedder.shape[-1]
    if labels.max() >= classes:
        raise ValueError(f"{path}: class {labels.max()}, but this model knows 0 … {classes - 1}")
    return labels.astype(np.int32)[None], labels.shape


def _layout(path: Path, embedder: Embedder, pipe: Pipeline, size: Size) -> Read:
    size = tuple(side or pipe.config["image_size"] for side in size)
    tokens, objects = embedder.network.vocab_size, (embedder.shape[0] - 2) // 3
    condition = Boxes(embedder.name, objects=objects, tokens=tokens, min_area=0.0)
    name, categories, boxes = condition.read(path)
    if len(categories) > objects:
        raise ValueError(f"{path} has {len(categories)} objects; this model is told {objects}")
    for left, top, width, height in boxes:
        inside = left >= 0 and left + width <= size[1] and top >= 0 and top + height <= size[0]
        if not inside or min(width, height) <= 0:
            raise ValueError(
                f"{path}: the box {[left, top, width, height]} is empty or not inside {size[0]}×"
                f"{size[1]} (height×width)"
            )
    known = {"name": name, "categories": categories, "boxes": boxes}
    whole = {"placement": Placement(size, size, (0, 0), size)}
    return condition(known | whole, np.random.default_rng(0))[embedder.name][None], size


def _low_resolution(path: Path, embedder: Embedder, pipe: Pipeline, size: Size) -> Read:
    small = composite(read_image(path), (255, 255, 255))
    factor = pipe.autoencoder.downsampling // getattr(embedder.network, "factor", 1)
    return to_signed(small)[None], (factor * small.shape[0], factor * small.shape[1])


def _hint(path: Path, embedder: Embedder, pipe: Pipeline, size: Size) -> Read:
    hint = composite(read_image(path), (0, 0, 0))
    return hint[None], hint.shape[:2]


_READ = {
    "segmentation": _segmentation,
    "layout": _layout,
    "low_resolution": _low_resolution,
    "hint": _hint,
}
