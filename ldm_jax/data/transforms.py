"""Augmentations: pure functions (example, rng) -> example on the dicts of `sources`.

All randomness comes from the generator `rng`. Images are uint8 (H, W, 3) before and after.
Transforms that move pixels also update the example's `placement`.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ldm_jax.data.images import composite

Example = dict[str, Any]
Transform = Callable[..., Example]  # of an example, a generator, and options


def background(example: Example, rng: np.random.Generator) -> Example:
    """With probability ½, puts a picture with transparency on a random colour."""
    if "rgba" not in example or rng.random() < 0.5:
        return example
    colour = tuple(int(c) for c in rng.integers(0, 256, 3))
    return example | {"image": composite(example["rgba"], colour), "background": colour}


def flip(example: Example, rng: np.random.Generator) -> Example:
    """With probability ½, mirrors left and right; a caption that names a side becomes wrong.

    Stored latents become those of the mirror image, which were stored with them.
    """
    if rng.random() >= 0.5:
        return example
    mirrored = {}
    if "image" in example:
        mirrored["image"] = example["image"][:, ::-1]
    if "moments" in example:
        mirrored["moments"] = example["moments"].mirrored()
    return example | mirrored | _placed(example, "flipped")


def shift(example: Example, rng: np.random.Generator) -> Example:
    """Moves the picture by up to an eighth of its size in each direction."""
    height, width = example["image"].shape[:2]
    top = int(rng.integers(-(height // 8), height // 8 + 1))
    left = int(rng.integers(-(width // 8), width // 8 + 1))
    moved = {"image": _window(example, example["image"], top, left)}
    return example | moved | _placed(example, "moved", top, left)


def zoom(example: Example, rng: np.random.Generator) -> Example:
    """Scales by 0.8 to 1.25, log-uniformly, and crops or pads to the old size at random."""
    image = example["image"]
    height, width = image.shape[:2]
    scale = np.exp(rng.uniform(np.log(0.8), np.log(1.25)))
    size = (round(width * scale), round(height * scale))
    scaled = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    top, left = (_between(rng, scaled.shape[axis] - image.shape[axis]) for axis in (0, 1))
    moved = {"image": _window(example, scaled, top, left)}
    if "placement" in example:
        where = example["placement"].scaled(scaled.shape[:2]).moved(top, left)
        moved["placement"] = where.cut(height, width)
    return example | moved


def color(example: Example, rng: np.random.Generator) -> Example:
    """Permutes the colour channels, then contrast and brightness by up to a fifth.

    For autoencoders with few training pictures. Captions with colours become wrong.
    """
    image = example["image"][..., rng.permutation(3)].astype(np.float32)
    contrast, brightness = rng.uniform(0.8, 1.2), rng.uniform(-0.2, 0.2)
    image = (image - 127.5) * contrast + 127.5 + 255 * brightness
    return example | {"image": np.clip(np.round(image), 0, 255).astype(np.uint8)}


def unit_range(example: Example, rng: np.random.Generator) -> Example:
    """Halves the contrast towards white, x → 127.5 + x / 2, so that the networks, which get
    x / 127.5 − 1, get pixels in [0, 1] in place of [−1, 1].

    This is the fault of the data of MLPerf's Stable Diffusion 2 (mlcommons/training#721), for runs
    that are compared with its own. A model trained so draws pale pictures.
    """
    del rng
    return example | {"image": np.round(127.5 + example["image"] / 2.0).astype(np.uint8)}


def tags(example: Example, rng: np.random.Generator) -> Example:
    """With probability ½, the caption becomes one to three of caption and tags: "diet, red apple".

    A model trained with this also knows single words, and other seeds give other pictures of them.

    Raises:
      ValueError: the example has no "tags"; those of the emoji source may be empty.
    """
    if "tags" not in example:
        raise ValueError('augment "tags": only data.source="emoji" has tags')
    if rng.random() < 0.5:
        return example
    words = (example["caption"], *example["tags"])
    chosen = rng.permutation(len(words))[: rng.integers(1, 4)]
    return example | {"caption": ", ".join(words[i] for i in chosen)}


def captions(example: Example, rng: np.random.Generator) -> Example:
    """One of several captions, at random.

    Raises:
      ValueError: the example has no "captions"; those of a folder with annotations have.
    """
    if "captions" not in example:
        raise ValueError('augment "captions": only a folder with data.annotations has several')
    return example | {"caption": example["captions"][rng.integers(len(example["captions"]))]}


def drop_tags(
    example: Example, rng: np.random.Generator, share: float = 0.1, kept: float = 1
) -> Example:
    """Leaves out each of the caption's parts between commas with the probability `share`.

    The first `kept` always stay.
    """
    parts = _parts(example)
    stays = rng.random(len(parts)) >= share
    return _joined(example, [part for i, part in enumerate(parts) if i < kept or stays[i]])


def shuffle_tags(example: Example, rng: np.random.Generator, kept: float = 1) -> Example:
    """Puts the caption's parts between commas in random order, all but the first `kept`."""
    parts, kept = _parts(example), int(kept)
    order = kept + rng.permutation(max(len(parts) - kept, 0))
    return _joined(example, parts[:kept] + [parts[i] for i in order])


def _parts(example: Example) -> list[str]:
    return [part for part in map(str.strip, example["caption"].split(",")) if part]


def _joined(example: Example, parts: list[str]) -> Example:
    return example | {"caption": ", ".join(parts)}


# In the order of application: the background is needed before the picture moves.
TRANSFORMS: dict[str, Transform] = {
    "background": background,
    "flip": flip,
    "zoom": zoom,
    "shift": shift,
    "color": color,
    "unit_range": unit_range,
    "tags": tags,
    "captions": captions,
    "drop_tags": drop_tags,
    "shuffle_tags": shuffle_tags,
}


def compose(names: Sequence[str]) -> Transform:
    """One transform that applies the named ones, in the order of TRANSFORMS, not that of `names`.

    A name may be followed by numbers, its options: "drop_tags:0.2:1" is drop_tags(share=0.2,
    kept=1).

    Raises:
      ValueError: a name that is not in TRANSFORMS, or options that it has not.
    """
    options = dict(_name_and_options(name) for name in names)
    chosen = [(TRANSFORMS[name], options[name]) for name in TRANSFORMS if name in options]

    def apply(example: Example, rng: np.random.Generator) -> Example:
        for transform, numbers in chosen:
            example = transform(example, rng, *numbers)
        return example

    return apply


def _name_and_options(text: str) -> tuple[str, tuple[float, ...]]:
    name, *given = text.split(":")
    if name not in TRANSFORMS:
        raise ValueError(f"unknown augment {name!r}; choose from {', '.join(TRANSFORMS)}")
    known = list(inspect.signature(TRANSFORMS[name]).parameters)[2:]
    try:
        numbers = tuple(map(float, given))
    except ValueError:
        numbers = (-1.0,)
    if len(given) > len(known) or any(number < 0 for number in numbers):
        wanted = " and ".join(known) or "none"
        raise ValueError(f"augment {text!r}: its options are {wanted}, numbers of 0 and more")
    return name, numbers


def _placed(example: Example, move: str, *arguments: int) -> Example:
    """The placement after a move, of an example that has one."""
    if "placement" not in example:
        return {}
    return {"placement": getattr(example["placement"], move)(*arguments)}


def _between(rng: np.random.Generator, slack: int) -> int:
    """Uniform in 0..slack, or in slack..0 if slack is negative."""
    return int(rng.integers(min(slack, 0), max(slack, 0) + 1))


def _window(example: Example, image: np.ndarray, top: int, left: int) -> np.ndarray:
    """Crops a window of the example's own size from `image` (h, w, 3), at (top, left).

    Outside of `image` it is filled with the picture's background colour, or by repeating the edge.
    """
    height, width = example["image"].shape[:2]
    below, right = top + height - image.shape[0], left + width - image.shape[1]
    margins = [(max(-top, 0), max(below, 0)), (max(-left, 0), max(right, 0))]
    top, left = max(top, 0), max(left, 0)
    if "background" not in example:
        padded = np.pad(image, [*margins, (0, 0)], mode="edge")
    else:
        channels = zip(np.moveaxis(image, -1, 0), example["background"], strict=True)
        padded = np.stack([np.pad(c, margins, constant_values=v) for c, v in channels], axis=-1)
    return padded[top : top + height, left : left + width]
