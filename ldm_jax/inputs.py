"""What a caller asks for, as the inputs of a model's embedders, one for each picture."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm_jax.conditioning import Embedder
from ldm_jax.embedders import SIZES, SizeEmbedder, default_sizes

log = logging.getLogger(__name__)
Embedders = tuple[Embedder, ...]
# What guidance leads SDXL's refiner away from.
NEGATIVE_SIZES = {"aesthetic_score": 2.5}


def requests(
    embedders: Embedders,
    prompt: str | Sequence[str] | None,
    labels: int | Sequence[int] | None,
    n: int = 1,
    compose: Sequence[float] | None = None,
) -> list[dict[str, list]]:
    """What the pictures are of: one batch, n of each prompt; composed, one batch for each prompt.

    Raises:
      ValueError: a prompt or labels that the model needs and does not get, or the reverse; nothing
        to draw; another number of weights than of prompts.
    """
    needed = {key for embedder in embedders for key in embedder.needs}
    told = {}
    for key, argument, value in (("caption", "prompt", prompt), ("label", "labels", labels)):
        if (value is not None) != (key in needed):
            wants = "needs" if value is None else "takes no"
            raise ValueError(f"this model {wants} {argument}")
        if value is not None:
            told[key] = [value] if isinstance(value, str | int | np.integer) else list(value)
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
