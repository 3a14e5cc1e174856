"""The summary of its data that a run logs before anything compiles."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ldm_jax.conditions.base import Embedder
from ldm_jax.data.sources import sample
from ldm_jax.pictures import image_grid
from ldm_jax.training.batches import Prepare, training_loader

log = logging.getLogger(__name__)
SHOWN = 5
COLUMNS = 8


def log_summary(source: Any, held_out: Any, embedders: Sequence[Embedder] = ()) -> None:
    """Logs how many pictures and captions there are, and what of them is lost.

    Of an endless source, the first are looked at.
    """
    seen = sample(source)
    captions = [seen.describe(i)["caption"] for i in range(len(seen))]
    parts = [f"{len(source):,} pictures, {sum(map(bool, captions)):,} of them with captions"]
    if seen is not source:
        parts = [f"{len(source):,} pictures, of which the first {len(seen):,} are looked at"]
    tokenizers = [e.tokenizer for e in embedders if hasattr(e, "tokenizer")]
    for tokenizer in tokenizers[:1]:  # several read the same captions
        distinct = dict.fromkeys(captions)
        cut = {c for c in distinct if tokenizer.overflow(c)}
        if cut:
            count = sum(caption in cut for caption in captions)
            parts.append(f"captions cut at {tokenizer.max_length} tokens: {count:,}")
        unknown = dict.fromkeys(word for c in distinct for word in tokenizer.unknown(c))
        if unknown:
            some = ", ".join(repr(word) for word in list(unknown)[:SHOWN])
            parts.append(f"words that the vocabulary lacks: {len(unknown):,} ({some})")
    groups = getattr(source, "groups", None)
    if groups is not None:
        counts = np.bincount(groups, minlength=len(source.shapes)).tolist()
        shapes = zip(source.shapes, counts, strict=True)
        parts += [", ".join(f"{n:,} of {height} × {width}" for (height, width), n in shapes)]
    for what, reasons in (("pictures", source.left_out), ("captions", source.lost_captions)):
        parts += [f"{what} left out: {count:,}, {reason}" for reason, count in reasons.items()]
    log.info("Data: %s", "; ".join(parts))
    if not len(held_out):
        log.info("No picture is held out, so there is no held-out loss")


def first_pictures(config: Any, source: Any, prepare: Prepare, start: int) -> np.ndarray:
    """The pictures of batch `start` as a contact sheet, uint8 (H, W, 3)."""
    pictures = getattr(source, "pictures", source)
    loader = training_loader(config, pictures, prepare, ("image",))
    return image_grid(loader.batch(start)["image"], COLUMNS)


def first_latents(
    config: Any,
    source: Any,
    prepare: Prepare,
    start: int,
    decode: Callable[[np.ndarray], np.ndarray | None],
) -> np.ndarray:
    """What the first of batch `start` are the latents of, in a row, uint8 (H, W, 3).

    `decode` makes pictures of means (B, h, w, c). Where it gives None, three channels are shown as
    colours.
    """
    batch = training_loader(config, source, prepare, ("moments",)).batch(start)
    mean, _ = np.split(batch["moments"][:COLUMNS], 2, axis=-1)
    images = decode(mean)
    if images is None:
        colours = mean[..., [i % mean.shape[-1] for i in range(3)]]
        low, high = colours.min(), colours.max()
        images = np.uint8(255.0 * (colours - low) / max(high - low, 1e-6))
    return image_grid(images[..., :3], COLUMNS)
