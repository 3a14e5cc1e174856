"""Arrays and picture files: value ranges, contact sheets, PNGs with their settings."""

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

FITS = ("crop", "pad", "resize")
# Of the colours of the pictures that CLIP was trained on.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def to_signed(images: Any) -> Any:
    """uint8, or float in [0, 1], → float32 in [−1, 1]; NumPy or JAX."""
    scale = 127.5 if images.dtype == np.uint8 else 0.5
    return images.astype(np.float32) / np.float32(scale) - 1.0


def to_unit(images: Any) -> Any:
    """[−1, 1] → [0, 1], without clipping."""
    return (images + 1.0) / 2.0


def to_uint8(images: Any) -> np.ndarray:
    """Float [0, 1] → uint8, clipped and rounded."""
    return np.rint(np.clip(np.asarray(images, np.float32), 0.0, 1.0) * 255.0).astype(np.uint8)


def split_depth(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """LDM3D's six channels, float [0, 1] (Stan et al. 2023, §3.1) → RGB as uint8 (B, H, W, 3) and
    depth as uint16 (B, H, W): the last two channels are its high and its low byte."""
    bytes_ = to_uint8(images)
    return bytes_[..., :3], bytes_[..., 4].astype(np.uint16) * 256 + bytes_[..., 5]


def as_images(images: Any, count: int | None = None) -> np.ndarray:
    """A user's pictures → float32 (B, H, W, C) in [0, 1], `count` of them if that is given.

    uint8 or float in [0, 1]; one picture (H, W, C) is taken for each.

    Raises:
      ValueError: another shape, number or range.
    """
    images = np.asarray(images)
    if images.dtype.kind not in "biuf" or 0 in images.shape:
        raise ValueError(f"image of shape {images.shape} and {images.dtype}: expected an array")
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    images = images.astype(np.float32) / scale
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4:
        raise ValueError(f"image of shape {images.shape}: expected (H, W, C) or (B, H, W, C)")
    if not (images.min() >= 0.0 and images.max() <= 1.0):  # NaN is neither
        raise ValueError(
            f"image values {images.min():g} … {images.max():g}: expected uint8, or float in 0 … 1"
        )
    return images if count is None else _each(images, count, "image")


def as_mask(mask: Any, size: tuple[int, int], count: int) -> np.ndarray:
    """A mask (H, W), (B, H, W) or (B, H, W, 1) → float32 (count, H, W, 1) in [0, 1].

    uint8 (of 0 and 1, or up to 255), booleans, or numbers in [0, 1].

    Raises ValueError for another size or range.
    """
    mask = np.asarray(mask)
    shape = mask.shape
    mask = mask[..., 0] if mask.ndim == 4 and shape[-1] == 1 else mask
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or mask.shape[1:] != tuple(size):
        raise ValueError(f"mask of shape {shape}: expected {size[0]}×{size[1]}, as the image")
    scale = 255.0 if mask.dtype == np.uint8 and mask.max() > 1 else 1.0
    mask = mask.astype(np.float32) / scale
    if not (mask.min() >= 0.0 and mask.max() <= 1.0):  # NaN is neither
        raise ValueError(
            f"mask values {mask.min():g} … {mask.max():g}: expected uint8, or 0 (keep) … 1 (draw "
            "anew)"
        )
    return _each(mask[..., None], count, "mask")


def _each(arrays: np.ndarray, count: int, name: str) -> np.ndarray:
    if len(arrays) not in (1, count):
        raise ValueError(f"{len(arrays)} of {name} for {count} pictures: give one, or one for each")
    return np.broadcast_to(arrays, (count, *arrays.shape[1:]))


def multiples_beside(side: int, multiple: int) -> tuple[int, ...]:
    """The nearest multiples of a length: itself, or the ones below (if not 0) and above."""
    below = max(side, 0) // multiple * multiple
    beside = (side,) if below == side else (below, below + multiple)
    return tuple(value for value in beside if value > 0) or (multiple,)


def fitted_size(size: tuple[int, int], multiple: int, fit: str) -> tuple[int, int]:
    """(height, width) in multiples of `multiple` that a picture of `size` gets by `fit_picture`.

    Raises:
      ValueError: an unknown `fit`, or a picture too small to be cropped.
    """
    if fit not in FITS:
        raise ValueError(f"fit={fit!r}: choose one of {', '.join(FITS)}")
    if fit == "crop" and min(size) < multiple:
        raise ValueError(
            f"a picture of {size[0]}×{size[1]} (height×width) cannot be cropped to multiples of "
            f"{multiple} pixels; use fit=pad or fit=resize"
        )
    beside = [multiples_beside(side, multiple) for side in size]
    if fit != "resize":
        return tuple(sides[0 if fit == "crop" else -1] for sides in beside)

    def distortion(sides: tuple[int, int]) -> tuple[float, float]:
        high, wide = (math.log(new / old) for new, old in zip(sides, size, strict=True))
        return round(abs(high - wide), 6), abs(high + wide)

    return min(itertools.product(*beside), key=distortion)


def fit_picture(image: np.ndarray, multiple: int, fit: str, binary: bool = False) -> np.ndarray:
    """uint8 (H, W) or (H, W, C) whose sides become multiples of `multiple`, if they are not.

    Args:
      fit: "crop" cuts the edges off, evenly, to the next smaller multiples; "pad" repeats the edges
        up to the next larger ones, and `centre` of the old size undoes it; "resize" scales to that
        pair of neighbouring multiples which keeps the proportions best.
      binary: a mask: "resize" takes the nearest pixel.

    Raises:
      ValueError: as `fitted_size`.
    """
    size = image.shape[:2]
    sides = fitted_size(size, multiple, fit)
    if fit == "crop" or sides == size:
        return centre(image, sides)
    if fit == "pad":
        extra = [new - old for new, old in zip(sides, size, strict=True)]
        border = [(e // 2, e - e // 2) for e in extra] + [(0, 0)] * (image.ndim - 2)
        return np.pad(image, border, mode="edge")
    how = Image.Resampling.NEAREST if binary else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize(sides[::-1], how))


def centre(images: np.ndarray, size: tuple[int, int], axis: int = 0) -> np.ndarray:
    """The middle of `size` (height, width), which lie along `axis` and the one after it."""
    starts = [(images.shape[axis + i] - side) // 2 for i, side in enumerate(size)]
    rows, columns = (slice(at, at + side) for at, side in zip(starts, size, strict=True))
    return images[(*[slice(None)] * axis, rows, columns)]


def image_grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """uint8 (N, H, W, 3) in rows of `columns`, white between → one picture (H', W', 3)."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * columns, height + gap, width + gap, channels), 255, np.uint8)
    sheet[:count, :height, :width] = images
    sheet = sheet.reshape(rows, columns, *sheet.shape[1:]).swapaxes(1, 2)
    return sheet.reshape(rows * (height + gap), columns * (width + gap), channels)[:-gap, :-gap]


def save_png(path: str | os.PathLike, image: np.ndarray, settings: dict | None = None) -> None:
    """Writes uint8 (H, W, 3 or 1) or uint16 (H, W); `settings` go into the text chunk "ldm_jax"."""
    image = image[..., 0] if image.shape[-1] == 1 else image
    text = PngImagePlugin.PngInfo()
    if settings is not None:
        text.add_text("ldm_jax", json.dumps(settings))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, format="PNG", pnginfo=text)


def cubic_matrix(before: int, after: int, step: float | None = None, antialias: bool = False):
    """float64 (after, before): torch's bicubic resizing of one axis, between half-pixel centres.

    Keys' kernel (1981) with a = −¾, or −½ if antialiased. `step`: pixels before per pixel after;
    None: before / after.
    """
    step = before / after if step is None else step
    stretch, a = (max(step, 1.0), -0.5) if antialias else (1.0, -0.75)
    at = (np.arange(after) + 0.5) * step - 0.5
    first = np.floor(at).astype(int) - int(2 * stretch)
    taps = first[:, None] + np.arange(2 * int(2 * stretch) + 2)
    x = np.abs(taps - at[:, None]) / stretch
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    if antialias:  # only pixels of the picture count; else its edges are repeated
        weights = np.where((taps >= 0) & (taps < before), weights, 0.0)
        weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((after, before))
    rows = np.broadcast_to(np.arange(after)[:, None], taps.shape)
    np.add.at(matrix, (rows, np.clip(taps, 0, before - 1)), weights)
    return matrix


def cropped(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 (N, H, W, C) → (N, side, side, C), as CLIP sees pictures: the shorter side to `side`,
    by Pillow's bicubic in 8 bits, and of the longer one the middle."""
    height, width = images.shape[1:3]
    short = min(height, width)
    size = (side * width // short, side * height // short)
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    resized = np.empty((len(images), side, side, images.shape[-1]), np.uint8)
    for i, image in enumerate(images):
        whole = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        resized[i] = whole[top : top + side, left : left + side]
    return resized
