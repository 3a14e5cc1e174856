"""Between arrays and picture files: ranges, contact sheets, PNGs that remember their settings."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, PngImagePlugin


def to_float(images: jax.Array) -> jax.Array:
    """uint8 [0, 255] → float32 [−1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: Any) -> np.ndarray:
    """Float [0, 1] → uint8, clipped and rounded."""
    return np.rint(np.clip(np.asarray(images, np.float32), 0.0, 1.0) * 255.0).astype(np.uint8)


def split_depth(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """LDM3D's six channels, float [0, 1] (Stan et al. 2023, §3.1) → RGB as uint8 (B, H, W, 3) and
    depth as uint16 (B, H, W): the last two channels are its high and its low byte."""
    bytes_ = to_uint8(images)
    return bytes_[..., :3], bytes_[..., 4].astype(np.uint16) * 256 + bytes_[..., 5]


def as_images(images: Any, count: int | None = None) -> np.ndarray:
    """What users hand over → float32 (B, H, W, C) in [0, 1], `count` of them if that is given.

    uint8 or float in [0, 1]; one picture (H, W, C) is taken for each.

    Raises:
      ValueError: another shape, number or range.
    """
    images = np.asarray(images)
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    images = images.astype(np.float32) / scale
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4:
        raise ValueError(f"image of shape {images.shape}: expected (H, W, C) or (B, H, W, C)")
    if images.min() < 0.0 or images.max() > 1.0:
        raise ValueError(
            f"image values {images.min():g} … {images.max():g}: expected uint8, or float in 0 … 1"
        )
    return images if count is None else _each(images, count, "image")


def as_mask(mask: Any, size: tuple[int, int], count: int) -> np.ndarray:
    """A mask (H, W), (B, H, W) or (B, H, W, 1) of 0 and 1 (or 255, or booleans) → float32
    (count, H, W, 1) of 0 and 1. Raises ValueError for another size, or for values between."""
    mask = np.asarray(mask)
    shape, values = mask.shape, np.unique(mask)
    mask = mask[..., 0] if mask.ndim == 4 and shape[-1] == 1 else mask
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or mask.shape[1:] != tuple(size):
        raise ValueError(f"mask of shape {shape}: expected {size[0]}×{size[1]}, as the image")
    largest = 255 if mask.dtype == np.uint8 and values[-1] > 1 else 1
    if not set(values.tolist()) <= {0, largest}:
        raise ValueError(
            f"mask with values {values[0]} … {values[-1]}: must be binary, 0 to keep and 1 (or "
            "255) to draw anew"
        )
    return _each((mask > 0).astype(np.float32)[..., None], count, "mask")


def _each(arrays: np.ndarray, count: int, name: str) -> np.ndarray:
    if len(arrays) not in (1, count):
        raise ValueError(f"{len(arrays)} of {name} for {count} pictures: give one, or one for each")
    return np.repeat(arrays, count // len(arrays), axis=0)


def image_grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """uint8 (N, H, W, 3) in rows of `columns`, white between → one picture (H', W', 3)."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * columns, height + gap, width + gap, channels), 255, np.uint8)
    sheet[:count, :height, :width] = images
    sheet = sheet.reshape(rows, columns, *sheet.shape[1:]).swapaxes(1, 2)
    return sheet.reshape(rows * (height + gap), columns * (width + gap), channels)[:-gap, :-gap]


def save_png(path: str | os.PathLike, image: np.ndarray, settings: dict | None = None) -> None:
    """Writes uint8 (H, W, 3) or uint16 (H, W); `settings` go into the text chunk "ldm_jax"."""
    text = PngImagePlugin.PngInfo()
    if settings is not None:
        text.add_text("ldm_jax", json.dumps(settings))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, format="PNG", pnginfo=text)
