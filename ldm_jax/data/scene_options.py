"""What can be chosen of scenes, and what cannot."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_jax.data import scene_text
from ldm_jax.data.emoji import read_emoji
from ldm_jax.data.scene_layout import fitting

CANVAS = (64, 512)
PER_SCENE = 4
SIZES = 5  # different sizes of an object
GRIDS = (1, 2, 4, 8, 16)
SMALLEST = 16  # pixels of an object's longer side, to be recognised


@dataclasses.dataclass(frozen=True)
class SceneOptions:
    """The section `data.scenes` of a config.

    Attributes:
      kinds: use the first so many of `scene_text.KINDS`.
      names: use the emoji of these names instead.
      objects: the least and the most in a scene, within 1 … 4.
      size: the least and the greatest longer side of an object, as shares of the canvas.
      grid: objects begin at multiples of so many pixels, a divisor of 16; at 8, the pixels of a
        latent of an f8 autoencoder, an object covers the latents alike wherever it stands.
      grounds: the names of the grounds, of `scene_text.GROUNDS`; empty: all.
      textures: whether half of the grounds are textured.
      train_scenes, held_out_scenes: how many scenes each split has.
      seed: of everything but what is held out.
    """

    kinds: int = len(scene_text.KINDS)
    names: tuple[str, ...] = ()
    objects: tuple[int, int] = (1, 4)
    size: tuple[float, float] = (0.3125, 0.4375)
    grid: int = 1
    grounds: tuple[str, ...] = ()
    textures: bool = True
    train_scenes: int = 10_000_000
    held_out_scenes: int = 2_048
    seed: int = 0


def read_options(options: Mapping[str, Any]) -> SceneOptions:
    """The options, checked; ValueError names the one that cannot be."""
    known = [field.name for field in dataclasses.fields(SceneOptions)]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise ValueError(f"data.scenes has no option {unknown[0]!r}; it has {', '.join(known)}")
    chosen = SceneOptions(**options)
    least = {"train_scenes": 1, "held_out_scenes": 0, "seed": 0}
    for name, number in least.items():
        if getattr(chosen, name) < number:
            raise ValueError(
                f"data.scenes.{name}={getattr(chosen, name)}: expected {number} or more"
            )
    for name in ("objects", "size"):
        pair = getattr(chosen, name)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(
                f"data.scenes.{name}={pair}: expected two numbers, the least and the most"
            )
    least, most = chosen.objects
    if not 1 <= least <= most <= PER_SCENE:
        raise ValueError(
            f"data.scenes.objects={least, most}: the least and the most number of objects, within "
            f"1 … {PER_SCENE}"
        )
    if chosen.grid not in GRIDS:
        allowed = ", ".join(map(str, GRIDS))
        raise ValueError(f"data.scenes.grid={chosen.grid}: choose {allowed} pixels")
    unknown = [name for name in chosen.grounds if name not in scene_text.GROUNDS]
    if unknown:
        allowed = ", ".join(scene_text.GROUNDS)
        raise ValueError(f"data.scenes.grounds: there is no {unknown[0]!r}; choose of {allowed}")
    return chosen


def kinds_of(options: SceneOptions) -> tuple[str, ...]:
    """The names of the emoji that scenes are made of; ValueError if there are no such."""
    known, names = scene_text.KINDS, tuple(options.names)
    if not names:
        if not 1 <= options.kinds <= len(known):
            raise ValueError(f"data.scenes.kinds={options.kinds}: choose 1 … {len(known)}")
        return known[: options.kinds]
    emoji = [record["name"] for record in read_emoji()[1]]
    called: dict[str, str] = {}
    for name in names:
        if name not in emoji:
            near = difflib.get_close_matches(name, emoji, 3)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise ValueError(f"data.scenes.names: there is no emoji {name!r}{hint}")
        for noun in scene_text.nouns(name):
            if noun in called:
                raise ValueError(
                    f"data.scenes.names: {called[noun]!r} and {name!r} are both called {noun!r} in "
                    "captions; name one of them"
                )
            called[noun] = name
    return names


def sizes_of(side: int, options: SceneOptions) -> list[int]:
    """The longer sides in pixels that objects have; ValueError if they are too small or large."""
    if not CANVAS[0] <= side <= CANVAS[1]:
        raise ValueError(
            f"data.image_size={side}: scenes have {CANVAS[0]} … {CANVAS[1]} pixels a side"
        )
    side_by_side = min(options.objects[1], 2)
    largest = max(n for n in range(side) if fitting([n], side_by_side, side, options.grid)) / side
    least, most = options.size
    if not SMALLEST / side <= least <= most <= largest:
        allowed = f"{SMALLEST / side:.3g} … {largest:.3g}"
        raise ValueError(
            f"data.scenes.size={least, most}: the least and the greatest share of the canvas, "
            f"within {allowed} for image_size={side} and up to {options.objects[1]} objects"
        )
    return sorted({round(side * share) for share in np.linspace(least, most, SIZES)})
