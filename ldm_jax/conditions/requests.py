"""From a caller's prompts, labels and arrays to the embedders' inputs, one for each picture."""

import difflib
import logging
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ldm_jax.conditions.base import Embedder
from ldm_jax.conditions.kinds import SIZES, default_sizes
from ldm_jax.pictures import multiples_beside

log = logging.getLogger(__name__)
Embedders = tuple[Embedder, ...]
# The negative score of SDXL's refiner.
NEGATIVE_SIZES = {"aesthetic_score": 2.5}
FEW = 20  # classes that an error lists


def check_side(name: str, side: int, multiple: int) -> None:
    """Raises ValueError for a side of a picture, in pixels, that is no multiple; names the nearest
    two."""
    beside = multiples_beside(side, multiple)
    if side not in beside:
        raise ValueError(
            f"{name}={side}: this model draws multiples of {multiple} pixels, such as "
            f"{' or '.join(map(str, beside))}"
        )


def check_guidance(embedders: Embedders, scale: Any, method: str = "cfg") -> None:
    """Raises ValueError for a guidance scale that a model with these embedders cannot use."""
    if np.all(np.asarray(scale) == 1.0) and method != "cfg++":  # which always needs both
        return
    guided = [e for e in embedders if e.guided]
    undropped = [e.name for e in guided if not e.dropout]
    if not guided:
        raise ValueError(
            f"guidance={np.max(scale):g}, but this model has no condition to be guided by; "
            "use guidance=1"
        )
    if undropped:
        raise ValueError(
            f"guidance={np.max(scale):g}, but this model was trained without dropping its "
            f"condition (conditioning.{undropped[0]}.dropout is 0), so it knows no "
            "unconditional prediction to lead away from; use guidance=1"
        )


def parts(count: int, batch: int | None) -> list[np.ndarray]:
    """The rows 0 … `count` − 1 in parts of `batch`, or in one part; the last part repeats the last
    row, so that all have one length. Raises ValueError for a `batch` below 1."""
    if batch is not None and batch < 1:
        raise ValueError(f"batch={batch}: at least one picture must be drawn at a time")
    size = min(batch or count, count)
    starts = range(0, count, size)
    return [np.minimum(np.arange(start, start + size), count - 1) for start in starts]


def label_index(label: int | str, classes: Sequence[str] = ()) -> int:
    """The number of a label, given as a class's name, as a number, or as digits.

    Digits are a number unless a class has that name. Composed and decomposed letters are equal.

    Raises:
      ValueError: a name that is none of `classes`; names the nearest.
    """
    if not isinstance(label, str):
        return int(label)
    names = [unicodedata.normalize("NFC", name) for name in classes]
    name = unicodedata.normalize("NFC", label)
    if name in names:
        return names.index(name)
    if re.fullmatch(r"-?[0-9]+", name):
        return int(name)
    if not names:
        raise ValueError(f"label {label!r}: this model has no class names, only numbers")
    folded = {other.lower(): other for other in reversed(names)}
    near = [folded[other] for other in difflib.get_close_matches(name.lower(), folded)]
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    known = f"; its classes are {', '.join(names)}" if len(names) <= FEW else ""
    if not hint and not known:
        known = f"; it has {len(names)}, such as {', '.join(names[:3])}"
    raise ValueError(f"label {label!r}: this model has no class of that name{hint}{known}")


def label_name(label: int | str, classes: Sequence[str] = ()) -> str:
    """A label's name in file names and settings: its class, or "label 3".

    Raises:
      ValueError: as `label_index`.
    """
    index = label_index(label, classes)
    return classes[index] if 0 <= index < len(classes) else f"label {index}"


def requests(
    embedders: Embedders,
    prompt: str | Sequence[str] | None,
    labels: int | str | Sequence[int | str] | None,
    n: int = 1,
    weights: Sequence[float] | None = None,
    classes: Sequence[str] = (),
) -> list[dict[str, list]]:
    """The entries "caption" and "label" of the pictures: one batch, n of each prompt; with
    `weights`, one batch for each prompt.

    `classes` are the names that `labels` may use, in the order of their numbers.

    Raises:
      ValueError: prompts or labels are missing, or given to a model without; an unknown class;
        nothing to draw; the number of weights is not that of the prompts.
    """
    needed, entries = _needed(embedders), {}
    for key, argument, value in (("caption", "prompt", prompt), ("label", "labels", labels)):
        if (value is not None) != (key in needed):
            wants = "needs" if value is None else "takes no"
            raise ValueError(f"this model {wants} {argument}")
        if value is not None and key == "caption":
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, Sequence) or not all(isinstance(t, str) for t in texts):
                raise ValueError(f"prompt={value!r}: give a text, or a list of them")
        if value is not None:
            entries[key] = [value] if isinstance(value, str | int | np.integer) else list(value)
    if "label" in entries:
        entries["label"] = [label_index(label, classes) for label in entries["label"]]
    counts = {len(values) for values in entries.values()} or {1}
    if len(counts) > 1:
        raise ValueError(f"{len(entries['caption'])} prompts for {len(entries['label'])} labels")
    (count,) = counts
    if not count or n < 1:
        raise ValueError(f"{count} prompts, n={n}: at least one picture must be requested")
    if weights is None:
        return [{key: [v for v in values for _ in range(n)] for key, values in entries.items()}]
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights of guidance (compose) for {count} prompts")
    return [{key: [values[i]] * n for key, values in entries.items()} for i in range(count)]


def other_entries(
    embedders: Embedders, given: dict[str, Any] | None, count: int, side: Sequence[int]
) -> dict[str, Any]:
    """The caller's entries other than prompts, labels and pictures; and all of `SIZES`, (count, 1
    or 2), by default those of an uncropped picture of `side` (height, width).

    Raises ValueError for an entry that no embedder needs, and for sizes of the wrong shape.
    """
    others = [e for e in _needed(embedders) if e not in ("caption", "label", "image", "mask")]
    for name in given or {}:
        if name not in others:
            takes = ", ".join(others) or "none"
            raise ValueError(f"conditions: this model takes no {name!r}; it takes {takes}")
    return dict(given or {}) | _sizes(given or {}, count, side)


def negative_entries(
    embedders: Embedders,
    prompt: str | Sequence[str] | None,
    given: dict[str, Any] | None,
    negative: dict[str, Any] | None,
    count: int,
    side: Sequence[int],
) -> dict[str, Any]:
    """The negative entries: "caption", unless the prompt is None, and sizes, from `negative` or
    else, except for the score, from `given`.

    Raises ValueError for anything but one prompt for all pictures or one for each, for a prompt to
    a model without prompts, and for negative entries that are no sizes of this model.
    """
    for name in negative or {}:
        if name not in SIZES or name not in _needed(embedders):
            sizes = ", ".join(e for e in _needed(embedders) if e in SIZES) or "none"
            raise ValueError(f"negative: guidance cannot lead away from {name!r} here, but {sizes}")
    entries = _sizes((given or {}) | NEGATIVE_SIZES | (negative or {}), count, side)
    if prompt is None:
        return entries
    prompts = [prompt] * count if isinstance(prompt, str) else prompt
    texts = isinstance(prompts, Sequence) and all(isinstance(p, str) for p in prompts)
    if not texts or len(prompts) != count:
        raise ValueError(
            f"negative_prompt={prompt!r}: give one text for all pictures, or a list of {count}, "
            "one for each"
        )
    if "caption" not in _needed(embedders):
        raise ValueError("this model takes no prompts, and so no negative_prompt")
    return entries | {"caption": list(prompts)}


def _sizes(given: dict[str, Any], count: int, side: Sequence[int]) -> dict[str, np.ndarray]:
    entries = {}
    for name, default in default_sizes(*side).items():
        value, width = np.asarray(given.get(name, default), np.float32), SIZES[name]
        if value.size != width and value.shape not in ((count, width), (count,) * (width == 1)):
            raise ValueError(
                f"conditions: {name} of shape {value.shape}: expected {width} numbers, or as many "
                f"for each of {count} pictures"
            )
        entries[name] = np.broadcast_to(value.reshape(-1, width), (count, width))
    return entries


def _needed(embedders: Embedders) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry for embedder in embedders for entry in embedder.needs))


def inputs_for(embedders: Embedders, batch: dict[str, Any], count: int) -> dict[str, np.ndarray]:
    """The embedders' inputs, `count` of each; warns of prompts that are cut.

    Raises:
      ValueError: the batch lacks an entry of an embedder, or has a wrong number of them.
    """
    inputs = {}
    for embedder in embedders:
        missing = [key for key in embedder.needs if key not in batch]
        if missing:
            raise ValueError(f"this model needs conditions={{{missing[0]!r}: an array}}")
        raw = embedder.prepare(batch)
        given = len(raw[0] if isinstance(raw, tuple) else raw)  # chunks are two arrays
        if given not in (1, count):
            raise ValueError(f"{given} of {embedder.name} for {count} pictures")
        copies = count // given
        inputs[embedder.name] = jax.tree.map(lambda v, n=copies: np.repeat(v, n, axis=0), raw)
        for sentence in embedder.cut(batch):
            log.warning(sentence)
    return inputs


def negatives_for(
    embedders: Embedders, inputs: dict[str, np.ndarray], entries: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The inputs of guidance's negative side; `entries` as `Embedder.negative` takes them."""
    for embedder in embedders:
        if "caption" in entries:
            for sentence in embedder.cut(entries):
                log.warning("negative_prompt: %s", sentence)
    return {e.name: e.negative(inputs[e.name], entries) for e in embedders}
