"""What a picture of a scene shows: which objects, where; and whether that is what was asked.

No network is needed, as the objects are known to the pixel. Every kind at every size is laid over
every place of the picture, and the placement that explains most of it is an object: with D the
picture less its ground G, and T and α the colours and opacity of a kind, the squared error falls by

    Σ|D|² − Σ|D − α(T − G)|² = 2 Σ α D·(T − G) − Σ α²|T − G|².

So "right" means nearest in pixels among all kinds of the source, at the sizes it uses.
"""

import dataclasses
import functools
import heapq
from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.data.scene_drawing import sprite
from ldm_jax.data.scenes import RELATIONS, Scene, SceneSource

BATCH = 4
CELL = 8  # of each template the best placement in every cell is looked at
LOOKED_AT = 64  # templates in every cell, those that explain most
MOST = 6  # objects: more than a scene has, so that too many are seen as too many
SMALL = 18  # pixels that are enough for the smallest object: larger pictures are shrunk
EXPLAINED = 0.5  # of the squares under an object, at least; else it is no object, or a ruined one


@dataclasses.dataclass(frozen=True)
class Found:
    """An object in a picture: its kind, and (left, top, width, height) in pixels."""

    kind: int
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> np.ndarray:
        left, top, width, height = self.box
        return np.array([left + width / 2, top + height / 2])


def read_scene(images: np.ndarray, source: SceneSource) -> list[list[Found]]:
    """The objects in each picture, the surest first.

    Args:
      images: uint8 (N, size, size, 3), of the source's size.
      source: says which kinds there may be, and their sizes.

    Raises:
      ValueError: pictures of another size or type.
    """
    side = source.image_size
    if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
        raise ValueError(
            f"expected pictures uint8 (N, {side}, {side}, 3), as the source draws them, got "
            f"{images.dtype} {images.shape}"
        )
    factor = max(
        f for f in range(1, side) if side % f == 0 and source.sizes[0] // f >= SMALL or f == 1
    )
    templates = _templates(source.kinds, tuple(s // factor for s in source.sizes), side // factor)
    found = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH].astype(np.float32) / 255.0
        batch = batch.reshape(len(batch), side // factor, factor, side // factor, factor, 3)
        batch = batch.mean(axis=(2, 4))
        padded = np.concatenate([batch, np.repeat(batch[-1:], BATCH - len(batch), axis=0)])
        placements = jax.device_get(_placements(padded, templates.arrays))
        found += [
            _choose(templates, *(p[i] for p in placements), factor) for i in range(len(batch))
        ]
    return found


def score(images: np.ndarray, scenes: Sequence[Scene], source: SceneSource) -> dict[str, float]:
    """The shares of `answers`; NaN where no scene asks."""
    found = answers(images, scenes, source)
    return {name: float(np.mean(r)) if r else float("nan") for name, r in found.items()}


def answers(
    images: np.ndarray, scenes: Sequence[Scene], source: SceneSource
) -> dict[str, list[bool]]:
    """Whether the pictures show what their scenes ask for.

    Args:
      images: uint8 (N, size, size, 3).
      scenes: N, of `source.scene`.
      source: as of `read_scene`.

    Returns:
      `objects`: the kinds are those asked, and no others, of all scenes. `relation`: and they stand
      as asked, of the scenes with "left of" or "above". `count`: one kind, so often as asked, of
      the scenes with one kind. `scene`: all that is asked.
    """
    results: dict[str, list[bool]] = {"objects": [], "relation": [], "count": [], "scene": []}
    for scene, found in zip(scenes, read_scene(images, source), strict=True):
        seen = Counter(one.kind for one in found)
        objects, count = seen.keys() == dict(scene.groups).keys(), seen == dict(scene.groups)
        related = objects and _related(found, scene)
        results["objects"].append(objects)
        results["scene"].append(count and related)
        if scene.relation in RELATIONS:
            results["relation"].append(related)
        if len(scene.groups) == 1:
            results["count"].append(count)
    return results


def _related(found: Sequence[Found], scene: Scene) -> bool:
    """Whether the groups stand one after another as the caption says; True if it says nothing."""
    if scene.relation not in RELATIONS:
        return True
    groups = [np.array([f.centre for f in found if f.kind == kind]) for kind, _ in scene.groups]
    axis = RELATIONS.index(scene.relation)
    for first, second in zip(groups, groups[1:], strict=False):
        apart = np.abs(second.mean(0) - first.mean(0))
        if first[:, axis].max() >= second[:, axis].min() or apart[axis] < apart[1 - axis]:
            return False
    return True


@dataclasses.dataclass(frozen=True)
class _Templates:
    """T templates: their kinds (T,), colours times opacity and opacity, float32 (h, w, 4) of each,
    and for `_placements`: spectra of both, the sums of α²|T|², α²T and α², and where they fit."""

    kinds: np.ndarray
    sprites: list[np.ndarray]
    arrays: dict[str, jax.Array]


@functools.lru_cache(maxsize=2)
def _templates(kinds: tuple[str, ...], sizes: tuple[int, ...], side: int) -> _Templates:
    sizes = tuple(dict.fromkeys(sizes))
    count = len(kinds) * len(sizes)
    colour, alpha = np.zeros((count, side, side, 3), np.float32), np.zeros((count, side, side))
    shapes, sprites = np.zeros((count, 2), np.int64), []
    for i, (name, size) in enumerate((name, size) for name in kinds for size in sizes):
        pixels = sprite(name, size) / np.float32(255.0)
        shapes[i] = height, width = pixels.shape[:2]
        sprites.append(np.concatenate([pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]], -1))
        colour[i, :height, :width] = sprites[-1][..., :3]
        alpha[i, :height, :width] = pixels[..., 3]
    corner = np.arange(side)
    fits = [corner[None] <= side - shapes[:, axis, None] for axis in (0, 1)]
    arrays = {
        "colour": np.conj(np.fft.rfft2(colour, axes=(1, 2))).astype(np.complex64),
        "alpha": np.conj(np.fft.rfft2(alpha)).astype(np.complex64),
        "square": np.sum(colour**2, axis=(1, 2, 3)),
        "mixed": np.einsum("tyxc,tyx->tc", colour, alpha).astype(np.float32),
        "area": np.sum(alpha**2, axis=(1, 2)).astype(np.float32),
        "fits": fits[0][:, :, None] & fits[1][:, None],
    }
    return _Templates(
        np.repeat(np.arange(len(kinds)), len(sizes)), sprites, jax.tree.map(jnp.asarray, arrays)
    )


@jax.jit
def _placements(images: jax.Array, templates: dict[str, jax.Array]):
    """What is not ground (B, h, w, 3), the ground (B, 3); and the best placement of every template
    in every cell: its gain and its corner's index, each (B, T, cells)."""
    side = images.shape[1]
    edge = jnp.concatenate(
        [
            images[:, :2],
            images[:, -2:],
            images[:, :, :2].swapaxes(1, 2),
            images[:, :, -2:].swapaxes(1, 2),
        ],
        axis=1,
    )
    ground = jnp.median(edge.reshape(len(images), -1, 3), axis=1)

    def one(image, ground):
        rest = image - ground
        spectrum = jnp.fft.rfft2(rest, axes=(0, 1))
        product = jnp.einsum("yxc,tyxc->tyx", spectrum, templates["colour"])
        product -= jnp.einsum("yxc,c->yx", spectrum, ground)[None] * templates["alpha"]
        added = templates["square"] - 2 * templates["mixed"] @ ground
        added += templates["area"] * jnp.sum(ground**2)
        gain = 2 * jnp.fft.irfft2(product, (side, side)) - added[:, None, None]
        gain = jnp.where(templates["fits"], gain, -jnp.inf)
        across = -(-side // CELL)
        beyond = (0, across * CELL - side)
        cells = jnp.pad(gain, ((0, 0), beyond, beyond), constant_values=-jnp.inf)
        cells = cells.reshape(len(gain), across, CELL, across, CELL)
        cells = cells.transpose(0, 1, 3, 2, 4).reshape(len(gain), -1, CELL * CELL)
        best = jnp.argmax(cells, axis=-1)
        cell = jnp.arange(cells.shape[1])
        top = cell // across * CELL + best // CELL
        left = cell % across * CELL + best % CELL
        return rest, ground, jnp.max(cells, axis=-1), top * side + left

    return jax.vmap(one)(images, ground)


def _choose(
    templates: _Templates,
    rest: np.ndarray,
    ground: np.ndarray,
    gain: np.ndarray,
    corner: np.ndarray,
    factor: int,
) -> list[Found]:
    """The objects that explain most, each of what those before it leave.

    `rest` (h, w, 3) is the picture less its ground (3,); `gain` and `corner` are (T, cells).
    """
    rest = rest.copy()
    kept = min(LOOKED_AT, len(gain))
    likely = np.argpartition(-gain, kept - 1, axis=0)[:kept]
    queue = [
        (-gain[t, cell], t, corner[t, cell])
        for cell, several in enumerate(likely.T)
        for t in several
        if gain[t, cell] > 0
    ]
    heapq.heapify(queue)
    found: list[Found] = []
    while queue and len(found) < MOST:
        bound, template, place = heapq.heappop(queue)
        sprite_, (top, left) = templates.sprites[template], divmod(int(place), rest.shape[1])
        alpha = sprite_[..., 3:]
        height, width = alpha.shape[:2]
        part = rest[top : top + height, left : left + width]
        added = sprite_[..., :3] - alpha * ground
        exact = float(np.sum(added * (2 * part - added)))
        if exact <= EXPLAINED * np.sum(alpha * part**2):
            continue
        if queue and exact < -queue[0][0] and exact < -bound * (1 - 1e-4):
            heapq.heappush(queue, (-exact, template, place))  # others may explain more by now
            continue
        part -= added
        box = tuple(int(factor * n) for n in (left, top, width, height))
        found.append(Found(int(templates.kinds[template]), box))
    return found
