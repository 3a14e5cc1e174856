"""What a caller asks for, as the inputs of a model's embedders, one for each picture."""

import difflib
import logging
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm_jax.conditioning import Embedder
from ldm_jax.embedders import SIZES, SizeEmbedder, default_sizes
from ldm_jax.pictures import multiples_beside

log = logging.getLogger(__name__)
Embedders = tuple[Embedder, ...]
# What guidance leads SDXL's refiner away from.
NEGATIVE_SIZES = {"aesthetic_score": 2.5}
FEW = 20  # classes that an error lists


def check_finite(**arguments: Any) -> None:
    """Raises ValueError, by name, for what is no number, or has one that is not finite; None
    passes."""
    for name, value in arguments.items():
        if value is None:
            continue
        try:
            numbers = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{name}={value!r}: must be a number") from None
        wrong = numbers[~np.isfinite(numbers)]
        if wrong.size:
            raise ValueError(f"{name}={wrong.flat[0]:g}: must be a finite number")


def check_side(name: str, side: int, multiple: int) -> None:
    """Raises ValueError for a side of a picture, in pixels, that is no multiple; names the two
    beside it."""
    beside = multiples_beside(side, multiple)
    if side not in beside:
        raise ValueError(
            f"{name}={side}: this model draws multiples of {multiple} pixels, such as "
            f"{' or '.join(map(str, beside))}"
        )


def check_guidance(model: Any, guidance: Any, weak: Any = None) -> None:
    """Raises ValueError for a `LatentDiffusion` that cannot be guided, or not by that weak one."""
    if weak is not None:
        mine, its = (
            (m.latent_channels, m.parameterization, tuple(e.name for e in m.embedders))
            for m in (model, weak)
        )
        if mine != its:
            raise ValueError(
                "weak: a model of other latents, parameterization or conditions cannot guide "
                f"this one: {its} there, {mine} here"
            )
        return
    if np.all(np.asarray(guidance) == 1.0):
        return
    guided = [e for e in model.embedders if e.guided]
    undropped = [e.name for e in guided if not e.dropout]
    if not guided:
        raise ValueError(
            f"guidance={np.max(guidance):g}, but this model has no condition to be guided by; "
            "use guidance=1"
        )
    if undropped:
        raise ValueError(
            f"guidance={np.max(guidance):g}, but this model was trained without dropping its "
            f"condition (conditioning.{undropped[0]}.dropout is 0), so it knows no "
            "unconditional prediction to lead away from; use guidance=1"
        )


def parts(count: int, batch: int | None) -> list[np.ndarray]:
    """The rows 0 … `count` − 1 in parts of `batch`, or in one; the last part is filled up with the
    last row, so that all are of one length. Raises ValueError for a `batch` below 1."""
    if batch is not None and batch < 1:
        raise ValueError(f"batch={batch}: at least one picture must be drawn at a time")
    size = min(batch or count, count)
    starts = range(0, count, size)
    return [np.minimum(np.arange(start, start + size), count - 1) for start in starts]


def label_index(label: int | str, classes: Sequence[str] = ()) -> int:
    """The number of a label: of a class's name, or the number itself, as digits or not.

    Digits are a number unless a class has that name. Composed and decomposed letters are one.

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
    """How a label is called in file names and settings: by its class, or "label 3".

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
    compose: Sequence[float] | None = None,
    classes: Sequence[str] = (),
) -> list[dict[str, list]]:
    """What the pictures are of: one batch, n of each prompt; composed, one batch for each prompt.

    `classes` are the names that `labels` may use, in the order of their numbers.

    Raises:
      ValueError: a prompt or labels that the model needs and does not get, or the reverse; an
        unknown class; nothing to draw; another number of weights than of prompts.
    """
    needed = {key for embedder in embedders for key in embedder.needs}
    told = {}
    for key, argument, value in (("caption", "prompt", prompt), ("label", "labels", labels)):
        if (value is not None) != (key in needed):
            wants = "needs" if value is None else "takes no"
            raise ValueError(f"this model {wants} {argument}")
        if value is not None:
            told[key] = [value] if isinstance(value, str | int | np.integer) else list(value)
    if "label" in told:
        told["label"] = [label_index(label, classes) for label in told["label"]]
    counts = {len(values) for values in told.values()} or {1}
    if len(counts) > 1:
        raise ValueError(f"{len(told['caption'])} prompts for {len(told['label'])} labels")
    (count,) = counts
    if not count or n < 1:
        raise ValueError(f"{count} prompts, n={n}: at least one picture must be asked for")
    if compose is None:
        return [{key: [v for v in values for _ in range(n)] for key, values in told.items()}]
    if len(compose) != count:
        raise ValueError(f"compose has {len(compose)} weights for {count} prompts")
    return [{key: [values[i]] * n for key, values in told.items()} for i in range(count)]


def told_sizes(
    count: int, side: Sequence[int], sizes: dict[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """An entry (count, 1 or 2) for each of `SIZES`; what `sizes` leaves out is as for an uncropped
    picture of `side` (height, width). Raises ValueError for a name that is none of `SIZES`."""
    unknown = [name for name in sizes or {} if name not in SIZES]
    if unknown:
        raise ValueError(f"sizes: {unknown[0]!r} is none of {', '.join(SIZES)}")
    own = default_sizes(*side) | (sizes or {})
    check_finite(**own)
    return {name: np.tile(np.float32(value), (count, 1)) for name, value in own.items()}


def inputs_for(embedders: Embedders, batch: dict[str, Any], count: int) -> dict[str, np.ndarray]:
    """The embedders' inputs, `count` of each; warns of prompts that are cut.

    Raises:
      ValueError: the batch lacks what an embedder needs, or has another number of them.
    """
    inputs = {}
    for embedder in embedders:
        missing = [key for key in embedder.needs if key not in batch]
        if missing:
            raise ValueError(f"this model needs conditions={{{missing[0]!r}: an array}}")
        raw = embedder.prepare(batch)
        if len(raw) not in (1, count):
            raise ValueError(f"{len(raw)} of {embedder.name} for {count} pictures")
        inputs[embedder.name] = np.repeat(raw, count // len(raw), axis=0)
        for prompt in dict.fromkeys(batch["caption"] if "caption" in embedder.needs else ()):
            lost = embedder.tokenizer.overflow(prompt)
            if lost:
                length = embedder.tokenizer.max_length
                log.warning("a prompt is longer than %d tokens; cut: %r", length, lost)
    return inputs


def nulls_for(
    embedders: Embedders,
    inputs: dict[str, np.ndarray],
    negative_prompt: str,
    sizes: dict[str, np.ndarray],
    count: int,
) -> dict[str, np.ndarray]:
    """What guidance leads away from: `inputs`, but the negative prompt, no label, these sizes."""
    nulls = dict(inputs)
    for embedder in embedders:
        if "caption" in embedder.needs:
            raw = embedder.prepare({"caption": [negative_prompt]})
            nulls[embedder.name] = np.repeat(raw, count, axis=0)
        elif embedder.guided:
            nulls[embedder.name] = embedder.null(count)
        elif isinstance(embedder, SizeEmbedder):
            nulls[embedder.name] = embedder.prepare(sizes)
    return nulls
