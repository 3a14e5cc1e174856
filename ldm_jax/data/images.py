"""Reading and fitting pictures: any file Pillow reads becomes an 8-bit square of one size."""

import os

import numpy as np
from PIL import Image, ImageOps


def read_image(path: str | os.PathLike) -> np.ndarray:
    """A picture file as uint8 (H, W, 3), or (H, W, 4) where it has transparency; the first frame.

    EXIF orientation is applied. Grey, palette and CMYK pictures become RGB; 16-bit grey is scaled
    by 1/257, so that 65535 becomes 255 (Pillow's own conversion would clip). Colour profiles are
    ignored.

    Raises:
      Exception: whatever Pillow raises for a file that is not a whole picture (OSError, mostly).
      ValueError: pixels are floats or integers beyond 16 bits, which have no agreed range.
    """
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I") or image.mode == "F":
            grey = np.asarray(image)
            if grey.dtype.kind == "f" or grey.min() < 0 or grey.max() > 65535:
                raise ValueError(f"pixels of mode {image.mode} beyond 16 bits are not supported")
            grey = np.round(grey / 257).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=-1)
        return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def fit_square(image: np.ndarray, size: int) -> np.ndarray:
    """The centre square of uint8 (H, W, C), resized to (size, size, C), bicubic and antialiased."""
    height, width = image.shape[:2]
    if height == width == size:
        return image
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    # reducing_gap: large pictures are box-filtered down first, which is several times faster.
    resized = Image.fromarray(image).resize(
        (size, size),
        Image.Resampling.BICUBIC,
        box=(left, top, left + side, top + side),
        reducing_gap=3.0,
    )
    return np.asarray(resized)


def composite(image: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """uint8 (..., 4) RGBA over a colour gives uint8 (..., 3); RGB passes through."""
    if image.shape[-1] == 3:
        return image
    alpha = image[..., 3:].astype(np.uint16)
    over = image[..., :3] * alpha + np.asarray(background, np.uint16) * (255 - alpha)
    return ((over + 127) // 255).astype(np.uint8)
