"""Random masks for inpainting training: 1 where the model is to draw.

A mask is either a polyline or a few boxes (LaMa, Suvorov et al. 2022; Stable Diffusion's
`synthetic_mask`). Lengths are pixels of a picture of `side`, and scale with the picture. Latent
diffusion trained on LaMa's recipe (Rombach et al. 2022, §4.5), so "ldm" and "lama" are the same.
"""

import dataclasses

import numpy as np
from PIL import Image, ImageDraw


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Parameters of random masks. Ranges are inclusive; angles are in radians.

    Attributes:
      side: of the picture to which the lengths refer.
      lines: the probability of a polyline, else boxes.
      strokes, length, width: of a polyline: how many, and how long and wide each.
      boxes, box_side, margin: how many boxes, their sides, and their distance from the border.
      bend: an angle is drawn below it, and every second stroke turns back; None: any angle.
      rounded: the probability that a box has round corners.
    """

    side: int
    lines: float
    strokes: tuple[int, int]
    length: tuple[int, int]
    width: tuple[int, int]
    boxes: tuple[int, int] = (1, 1)
    box_side: tuple[int, int] = (1, 1)
    margin: int = 10
    bend: float | None = None
    rounded: float = 0.5


LAMA = Recipe(256, 0.5, (1, 5), (10, 209), (5, 104), (1, 4), (30, 150), bend=4.0, rounded=0.0)
RECIPES = {
    "lama": LAMA,
    "ldm": LAMA,
    "sd256": Recipe(256, 0.5, (1, 4), (10, 199), (5, 99), (1, 3), (30, 149)),
    "sd256_narrow": Recipe(256, 1.0, (4, 49), (10, 39), (5, 9)),
    "sd512": Recipe(512, 0.5, (1, 4), (10, 449), (5, 249), (1, 3), (30, 299)),
    "sd512_large": Recipe(512, 0.5, (1, 4), (10, 449), (5, 399), (1, 3), (75, 449)),
}


def draw_mask(recipe: Recipe, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A mask, uint8 (height, width) of 0 and 1."""
    scale = min(height, width) / recipe.side
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    if rng.random() < recipe.lines:
        _polyline(draw, recipe, scale, (width, height), rng)
    else:
        _boxes(draw, recipe, scale, (width, height), rng)
    return np.asarray(image)


def _between(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0], bounds[1] + 1))


def _polyline(draw, recipe, scale, size, rng):
    start = rng.uniform(0, 1, 2) * size
    for stroke in range(_between(rng, recipe.strokes)):
        if recipe.bend is None:
            angle = rng.uniform(0, 2 * np.pi)
        else:
            angle = rng.uniform(0, recipe.bend)
            angle = 2 * np.pi - angle if stroke % 2 == 0 else angle
        length = scale * _between(rng, recipe.length)
        thickness = max(round(scale * _between(rng, recipe.width)), 1)
        end = np.clip(start + length * np.array([np.sin(angle), np.cos(angle)]), 0, size)
        draw.line([*start, *end], fill=1, width=thickness)
        for x, y in (start, end):  # round ends connect the strokes
            r = thickness / 2
            draw.ellipse([x - r, y - r, x + r, y + r], fill=1)
        start = end


def _boxes(draw, recipe, scale, size, rng):
    margin = scale * recipe.margin
    for _ in range(_between(rng, recipe.boxes)):
        sides = [min(scale * _between(rng, recipe.box_side), s - 2 * margin) for s in size]
        left, top = (rng.uniform(margin, s - margin - b) for s, b in zip(size, sides, strict=True))
        box = [left, top, left + sides[0] - 1, top + sides[1] - 1]
        if rng.random() < recipe.rounded:
            draw.rounded_rectangle(box, radius=scale * _between(rng, (0, 59)), fill=1)
        else:
            draw.rectangle(box, fill=1)
