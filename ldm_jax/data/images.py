"""Reading and fitting pictures: any file that Pillow reads becomes 8-bit and of one shape."""

import os
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ldm_jax.data.placement import Placement

Colour = tuple[int, int, int]
Shape = tuple[int, int]  # (height, width) in pixels
WHITE: Colour = (255, 255, 255)


def read_image(path: str | os.PathLike) -> np.ndarray:
    """A picture file as uint8 (H, W, 3), or (H, W, 4) where it has transparency; the first frame.

    EXIF orientation is applied. Grey, palette and CMYK pictures become RGB; 16-bit grey is scaled
    by 1/257, so that 65535 becomes 255 (Pillow's own conversion would clip). Colour profiles are
    ignored.

    Raises:
      Exception: whatever Pillow raises for a file that is not a whole picture (mostly OSError).
      ValueError: pixels are floats or integers beyond 16 bits, which have no standard range.
    """
    with Image.open(path) as file:
        return _pixels(ImageOps.exif_transpose(file))


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """A mask's file as uint8 (H, W), 255 where it is set: the opacity of a picture that is
    transparent anywhere, the luminance of one that is not.

    Raises:
      Exception: as `read_image`.
    """
    image = read_image(path)
    if image.shape[-1] == 4 and (image[..., 3] < 255).any():
        return image[..., 3]
    return np.asarray(Image.fromarray(image[..., :3]).convert("L"))


def read_fitted(path: str | os.PathLike | IO[bytes], size: Shape) -> tuple[np.ndarray, Shape]:
    """The centre of a picture file, and (height, width) of the whole file, upright.

    The centre is `fit(read_image(path), size)`, uint8 (h, w, 3 or 4), except that a JPEG of at
    least twice that size is decoded at a half, a quarter or an eighth, which is several times
    faster and differs by about one grey level.

    Raises:
      Exception: as `read_image`.
    """
    with Image.open(path) as file:
        width, height = file.size
        turned = size[::-1] if _lies(file) else size  # as the file is stored
        drafted = file.draft(None, turned[::-1])  # only JPEGs; no side becomes less than this
        if drafted is None or file.size == (width, height):
            image = _pixels(ImageOps.exif_transpose(file))
            return fit(image, size), image.shape[:2]
        shape = (width, height) if _lies(file) else (height, width)
        extent = (drafted[1][3], drafted[1][2])
        fitted = Image.fromarray(fit(_pixels(file), turned, extent))
        fitted.getexif().update(file.getexif())
        return np.asarray(ImageOps.exif_transpose(fitted)), shape


def read_shape(path: str | os.PathLike | IO[bytes]) -> tuple[int, int]:
    """(height, width) of a picture file, upright, from its header alone: no pixel is decoded.

    Raises:
      Exception: whatever Pillow raises for a file that does not begin like a picture.
      ValueError: pixels are floats, which have no standard range.
    """
    with Image.open(path) as file:
        if file.mode == "F":
            raise ValueError(_no_range(file.mode))
        width, height = file.size
        # Pillow gives the upright size of a TIFF, and would decode a PNG to look for later EXIF.
        known = "exif" in file.info if file.format == "PNG" else file.format != "TIFF"
        return (width, height) if known and _lies(file) else (height, width)


def _lies(file: Image.Image) -> bool:
    """Whether the EXIF orientation exchanges height and width."""
    return file.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)


def _no_range(mode: str) -> str:
    return f"pixels of mode {mode} beyond 16 bits are not supported"


def _pixels(image: Image.Image) -> np.ndarray:
    """The result of `read_image` for an upright picture."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image)
        if grey.dtype.kind == "f" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError(_no_range(image.mode))
        grey = np.round(grey / 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def fit(image: np.ndarray, size: Shape, extent: tuple[float, float] | None = None) -> np.ndarray:
    """The centre of uint8 (H, W, C), all that the aspect ratio allows, resized to `size` (height,
    width), bicubic and antialiased.

    If the picture ends within its last pixels, `extent` is its exact (height, width).
    """
    height, width = extent or image.shape[:2]
    if image.shape[:2] == (height, width) == tuple(size):
        return image
    high, wide = min(height, width * size[0] / size[1]), min(width, height * size[1] / size[0])
    left, top = (width - wide) / 2, (height - high) / 2
    # reducing_gap: large pictures are box-filtered down first, which is several times faster.
    resized = Image.fromarray(image).resize(
        size[::-1],
        Image.Resampling.BICUBIC,
        box=(left, top, left + wide, top + high),
        reducing_gap=3.0,
    )
    return np.asarray(resized)


def composite(image: np.ndarray, background: Colour) -> np.ndarray:
    """uint8 (..., 4) RGBA over a colour → uint8 (..., 3); RGB is returned unchanged."""
    if image.shape[-1] == 3:
        return image
    alpha = image[..., 3:].astype(np.uint16)
    over = image[..., :3] * alpha + np.asarray(background, np.uint16) * (255 - alpha)
    return ((over + 127) // 255).astype(np.uint8)


def picture_entries(fitted: np.ndarray, original: Shape, background: Colour) -> dict[str, Any]:
    """The entries of an example that are made from its picture; see `sources`.

    Args:
      fitted: uint8 (h, w, 3 or 4), the centre of the file, as `fit` makes it.
      original: (height, width) of the file, upright.
      background: what transparent pixels are composited on.
    """
    placement = Placement.centre(original, fitted.shape[:2])
    if fitted.shape[-1] == 3:
        return {"image": fitted, "placement": placement}
    image = composite(fitted, background)
    return {"image": image, "rgba": fitted, "background": background, "placement": placement}
