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


def image_grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """uint8 (N, H, W, 3) in rows of `columns`, white between → one picture (H', W', 3)."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * columns, height + gap, width + gap, channels), 255, np.uint8)
    sheet[:count, :height, :width] = images
    sheet = sheet.reshape(rows, columns, *sheet.shape[1:]).swapaxes(1, 2)
    return sheet.reshape(rows * (height + gap), columns * (width + gap), channels)[:-gap, :-gap]


def save_png(path: str | os.PathLike, image: np.ndarray, settings: dict | None = None) -> None:
    """Writes uint8 (H, W, 3); `settings` go into the text chunk "ldm_jax" as JSON."""
    text = PngImagePlugin.PngInfo()
    if settings is not None:
        text.add_text("ldm_jax", json.dumps(settings))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, format="PNG", pnginfo=text)
