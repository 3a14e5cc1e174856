"""Objects and grounds of scenes as pixels."""

import dataclasses
import functools

import numpy as np
from PIL import Image

from ldm_jax.data import scene_text
from ldm_jax.data.emoji import read_emoji

CONTRAST = 70.0  # colours that differ by so much (of 441, white from black) are told apart
OPAQUE = 128  # alpha from which a pixel is the object's
COLOUR_JITTER, TEXTURE_STEP = 8, 15
LEVELS, VARIANTS = 16, 4  # shades of a texture, and versions of it


@functools.cache
def _emoji(name: str) -> np.ndarray:
    """The picture of an emoji without its transparent margins, uint8 (h, w, 4)."""
    _, records, pictures = read_emoji()
    picture = next(p for r, p in zip(records, pictures, strict=True) if r["name"] == name)
    rows, columns = (np.flatnonzero(picture[..., 3].any(axis)) for axis in (1, 0))
    return picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def contrast(name: str) -> np.ndarray:
    """The share of an emoji that can be seen on each of `scene_text.GROUNDS`, (G,)."""
    emoji = _emoji(name)
    colours = emoji[emoji[..., 3] >= OPAQUE][:, None, :3].astype(np.float32)
    grounds = np.array(list(scene_text.GROUNDS.values()), np.float32)
    return (np.linalg.norm(colours - grounds, axis=-1) > CONTRAST).mean(0)


@functools.lru_cache(maxsize=4096)
def sprite(name: str, size: int) -> np.ndarray:
    """An emoji whose longer side is `size` pixels, uint8 (h, w, 4)."""
    emoji = _emoji(name)
    height, width = (max(1, round(n * size / max(emoji.shape[:2]))) for n in emoji.shape[:2])
    return np.asarray(Image.fromarray(emoji).resize((width, height), Image.Resampling.BICUBIC))


@dataclasses.dataclass(frozen=True)
class Stamp:
    """An object ready to be drawn.

    Attributes:
      colour: 255 times what it adds to a picture, and 128, uint16 (h, w, 3).
      rest: 255 less its alpha, uint16 (h, w, 1).
      mask: its pixels, bool (h, w).
      box: of the mask: (left, top, width, height).
    """

    colour: np.ndarray
    rest: np.ndarray
    mask: np.ndarray
    box: tuple[int, int, int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape

    def draw(self, image: np.ndarray, top: int, left: int) -> None:
        """Puts it on a picture, uint8 (H, W, 3), in place."""
        height, width = self.shape
        area = image[top : top + height, left : left + width]
        over = area * self.rest + self.colour
        area[...] = (over + (over >> 8)) >> 8  # over 255, rounded


@functools.lru_cache(maxsize=4096)
def stamp(name: str, size: int) -> Stamp:
    """The emoji of this name, its longer side `size` pixels."""
    pixels = sprite(name, size)
    alpha, mask = pixels[..., 3:].astype(np.uint16), pixels[..., 3] >= OPAQUE
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    box = (left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top)
    return Stamp(pixels[..., :3] * alpha + np.uint16(128), 255 - alpha, mask, box)


def draw_ground(ground: int, texture: str, look: tuple[int, ...], size: int) -> np.ndarray:
    """A picture without objects, uint8 (size, size, 3).

    Args:
      ground: index into `scene_text.GROUNDS`.
      texture: "" or one of `scene_text.TEXTURES`.
      look: six whole numbers, from which come shade, place and kind of the texture.
      size: of the picture.
    """
    red, green, blue, top, left, kind = look
    jitter = [number % (2 * COLOUR_JITTER + 1) - COLOUR_JITTER for number in (red, green, blue)]
    base = np.array(list(scene_text.GROUNDS.values())[ground]) + jitter
    if not texture:
        image = np.empty((size, size, 3), np.uint8)
        image[:] = np.clip(base, 0, 255)
        return image
    step = -TEXTURE_STEP if base.mean() > 90 else TEXTURE_STEP
    shades = base + step * np.linspace(-0.5, 1.0, LEVELS)[:, None]
    pattern, period = _pattern(texture, kind % VARIANTS, size)
    top, left = top % period, left % period
    levels = pattern[top : top + size, left : left + size]
    return np.clip(shades, 0, 255).astype(np.uint8)[levels]


@functools.cache
def _pattern(texture: str, variant: int, size: int) -> tuple[np.ndarray, int]:
    """Levels below LEVELS, uint8 (size + period, size + period), and the period."""
    period = max(4, size // (8, 6, 8, 4)[variant] // 2 * 2)
    y, x = np.mgrid[: size + period, : size + period]
    match texture:
        case "striped":
            along = (x, y, x + y, x - y)[variant]
            value = along % period < period // 2
        case "checked":
            value = (x // (period // 2) + y // (period // 2)) % 2
        case "dotted":
            away = np.hypot(*(n % period - (period - 1) / 2 for n in (x, y)))
            value = np.clip(0.3 * period - away + 0.5, 0, 1)
        case "shaded":
            period = 1
            value = (x, y, size - x, size - y)[variant] / size
    return np.round(value * (LEVELS - 1.0)).clip(0, LEVELS - 1).astype(np.uint8), period
