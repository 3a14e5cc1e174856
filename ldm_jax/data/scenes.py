"""Scenes: pictures without end, made of the embedded emoji, with all that is known of them.

A scene is one to four objects on a plain or textured ground, and a pure function of (seed, split,
index). It has exact boxes, masks and classes, and a caption (`scene_text`). Each is of one form:

- one object anywhere;
- two to four objects of one kind;
- two kinds, one or two objects of each, one group left of or above the other; now and then the
  caption leaves out which ("a cat and a star");
- three kinds in a row, from left to right or from top to bottom.

Objects do not overlap. A group is left of another if it ends before the other begins and their
centres differ in height by at most a third of the distance; likewise above.

What is held out is a fixed share of the combinations, by the SHA-256 of their names:

- (object, relation, object), with the relation "left of" or "above": "b right of a" is "a left of
  b";
- (count, object), of two to four objects;
- (object, ground), of an object alone.

No training scene shows a combination that is held out, whether its caption says so or not. Every
scene of "held_out" shows one, and its caption says all. Of three in a row each two are a
combination.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ldm_jax.data import scene_text
from ldm_jax.data.placement import Placement
from ldm_jax.data.scene_drawing import contrast, draw_ground, stamp
from ldm_jax.data.scene_layout import Draws, fitting, place
from ldm_jax.data.scene_options import PER_SCENE, kinds_of, read_options, sizes_of
from ldm_jax.data.splits import check_split, is_held_out

RELATIONS = ("left of", "above")
# How often each form is drawn.
FORMS = {"one": 3, "count": 6, "two": 10, "row": 3}
UNTOLD, DOUBLED = 0.1, 0.3  # of "two": "with", and two of a kind
SHOWS = 0.85  # an object is put on grounds on which so much of it can be seen


@dataclasses.dataclass(frozen=True)
class Placed:
    """An object: its kind (an index), its longer side, and where its sprite begins, in pixels."""

    kind: int
    size: int
    top: int
    left: int


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
      objects: group by group.
      groups: (kind, count); of several, the left or upper comes first.
      relation: what the caption says of the groups: "left of", "above", "with" (neither), or "" of
        a single group.
      axis: the relation that the picture shows, one of RELATIONS; "" of a single group.
      ground: index into `scene_text.GROUNDS`.
      texture: "" or one of `scene_text.TEXTURES`.
      look: colour and texture in numbers, for drawing.
      caption: what is said.
    """

    objects: tuple[Placed, ...]
    groups: tuple[tuple[int, int], ...]
    relation: str
    axis: str
    ground: int
    texture: str
    look: tuple[int, ...]
    caption: str


class SceneSource:
    """Scenes as a source; see `sources` for what an example holds. Beside it:

    - `boxes` float32 (N, 4), (left, top, width, height) in pixels, and `categories` int32 (N,);
    - `masks` bool (N, size, size), the pixels of each object;
    - `segmentation` int32 (size, size), 0 on the ground and 1 + class on an object.

    `label` is the class of the first group, and `classes` are what the kinds are called.

    Args:
      split: "train", "held_out", or "all": the first and then the second.
      image_size: of the canvas, 64 … 512 pixels.
      options: the fields of `scene_options.SceneOptions`; missing ones have their defaults.
      fraction: of the combinations that are held out.

    Raises:
      ValueError: names the option that cannot be, and what can.
    """

    endless = True

    def __init__(
        self,
        split: str = "train",
        image_size: int = 64,
        options: Mapping[str, Any] = MappingProxyType({}),
        fraction: float = 0.1,
    ):
        check_split(split)
        chosen = read_options(options)
        self.kinds = kinds_of(chosen)
        self.classes = tuple(scene_text.nouns(name)[0] for name in self.kinds)
        self.left_out: dict[str, int] = {}
        self.lost_captions: dict[str, int] = {}
        self.image_size, self.objects = image_size, tuple(chosen.objects)
        self.sizes = sizes_of(image_size, chosen)
        self._seed, self._textured = chosen.seed, chosen.textures
        self._grid = chosen.grid
        self._three_fit = bool(fitting(self.sizes, 3, image_size, self._grid))
        self._tables = _tables(self.kinds, fraction, tuple(chosen.grounds))
        self._menus = {
            name: self._menu(name == "held_out")
            for name in ("train", "held_out")
            if split in (name, "all")
        }
        if not self._menus.get("train", True):
            raise ValueError(
                f"data.scenes: all scenes of {len(self.kinds)} kinds and {self.objects[0]} to "
                f"{self.objects[1]} objects are held out (data.held_out={fraction}); use more kinds"
            )
        counts = {"train": chosen.train_scenes, "held_out": chosen.held_out_scenes}
        self._counts = {name: counts[name] if menu else 0 for name, menu in self._menus.items()}

    def __len__(self) -> int:
        return sum(self._counts.values())

    def __getitem__(self, index: int) -> dict[str, Any]:
        split, number = self._at(index)
        scene = self.scene(index)
        side = (self.image_size,) * 2
        masks = self.masks(scene)
        categories = np.array([placed.kind for placed in scene.objects], np.int32)
        segmentation = np.zeros(side, np.int32)
        for mask, kind in zip(masks, categories, strict=True):
            segmentation[mask] = 1 + kind
        return {
            "image": self.draw(scene),
            "placement": Placement(side, side, (0, 0), side),
            "boxes": np.array([self.box(placed) for placed in scene.objects], np.float32),
            "categories": categories,
            "masks": masks,
            "segmentation": segmentation,
        } | self._describe(scene, split, number)

    def describe(self, index: int) -> dict[str, Any]:
        """Caption, label and name; nothing is drawn."""
        return self._describe(self.scene(index), *self._at(index))

    def scene(self, index: int) -> Scene:
        """What picture `index` shows."""
        split, number = self._at(index)
        draws = Draws(self._seed, ("train", "held_out").index(split), number)
        menu = self._menus[split]
        form = draws.pick(
            [name for name, often in FORMS.items() if name in menu for _ in range(often)]
        )
        while True:  # of "row" and "two", a draw may show what is held out
            drawn = getattr(self, f"_{form}")(menu[form], split == "held_out", draws)
            if drawn is not None:
                break
        lines, axis, relation, ground = drawn
        groups = tuple(
            (kind, len(list(run)))
            for kind, run in itertools.groupby(itertools.chain.from_iterable(lines))
        )
        if ground is None:
            ground = draws.pick(self._tables.grounds_of([kind for kind, _ in groups]))
        texture = draws.pick(scene_text.TEXTURES) if self._textured and draws.below(2) else ""
        look = tuple(draws.below(1 << 16) for _ in range(6))
        caption = scene_text.caption(
            [(self.kinds[kind], count) for kind, count in groups],
            relation,
            tuple(scene_text.GROUNDS)[ground],
            texture,
            draws.pick,
        )
        vertical = axis == "above" if axis else bool(draws.below(2))
        sizes = fitting(self.sizes, max(len(lines), *map(len, lines)), self.image_size, self._grid)
        chosen = [[(kind, draws.pick(sizes)) for kind in line] for line in lines]
        shapes = [[stamp(self.kinds[kind], size).shape for kind, size in line] for line in chosen]
        corners = place(shapes, self.image_size, vertical, bool(axis), draws, self._grid)
        objects = tuple(
            Placed(*drawn, *corner)
            for line in zip(chosen, corners, strict=True)
            for drawn, corner in zip(*line, strict=True)
        )
        return Scene(objects, groups, relation, axis, ground, texture, look, caption)

    def draw(self, scene: Scene) -> np.ndarray:
        """The picture, uint8 (size, size, 3)."""
        image = draw_ground(scene.ground, scene.texture, scene.look, self.image_size)
        for placed in scene.objects:
            stamp(self.kinds[placed.kind], placed.size).draw(image, placed.top, placed.left)
        return image

    def masks(self, scene: Scene) -> np.ndarray:
        """The pixels of each object, bool (N, size, size)."""
        masks = np.zeros((len(scene.objects), self.image_size, self.image_size), bool)
        for mask, placed in zip(masks, scene.objects, strict=True):
            shape = stamp(self.kinds[placed.kind], placed.size).mask
            height, width = shape.shape
            mask[placed.top : placed.top + height, placed.left : placed.left + width] = shape
        return masks

    def box(self, placed: Placed) -> tuple[int, int, int, int]:
        """(left, top, width, height) of an object's mask, in pixels."""
        left, top, width, height = stamp(self.kinds[placed.kind], placed.size).box
        return placed.left + left, placed.top + top, width, height

    def _at(self, index: int) -> tuple[str, int]:
        """Split and place in it."""
        index = range(len(self))[index]  # IndexError beyond the end, as iteration needs
        first = self._counts.get("train", 0)
        return ("train", index) if index < first else ("held_out", index - first)

    def _describe(self, scene: Scene, split: str, number: int) -> dict[str, Any]:
        return {
            "caption": scene.caption,
            "label": scene.groups[0][0],
            "name": f"scenes/{self._seed}/{split}/{number}",
        }

    def _menu(self, held_out: bool) -> dict[str, Any]:
        """For each form, the combinations that a scene of this split may be asked for."""
        tables, (least, most) = self._tables, self.objects
        in_row = most >= 3 >= least and len(self.kinds) > 2 and self._three_fit
        pairs = np.argwhere(tables.relation == held_out)
        pairs = pairs[pairs[:, 1] != pairs[:, 2]]
        counts = np.argwhere(tables.count == held_out)
        counts = counts[(counts[:, 0] >= max(2, least)) & (counts[:, 0] <= most)]
        alone = np.argwhere((tables.ground == held_out) & tables.shows)
        doubles = np.argwhere(~tables.count[2])[:, 0]
        menu = {
            "one": alone if least == 1 else (),
            "count": counts,
            "two": pairs if most >= 2 else (),
            "row": pairs if in_row else (),
        }
        if not held_out and least > 2:  # where there are two of a kind at least
            menu["two"] = pairs[np.isin(pairs[:, 1:], doubles).all(1)]
        if not held_out:  # three in a row are found by trying: only where there are any
            free = ~(tables.relation | np.eye(len(self.kinds), dtype=bool))
            menu["row"] = menu["row"] if any((one & (one @ one)).any() for one in free) else ()
        return {form: rows for form, rows in menu.items() if len(rows)}

    # Each form gives (lines of kinds, axis, relation told, ground or None), or None: draw again.

    def _one(self, rows: np.ndarray, held_out: bool, draws: Draws):
        kind, ground = draws.pick(rows).tolist()
        return [[kind]], "", "", ground

    def _count(self, rows: np.ndarray, held_out: bool, draws: Draws):
        count, kind = draws.pick(rows).tolist()
        shapes = {2: [(2,), (1, 1)], 3: [(2, 1), (1, 2)], 4: [(2, 2)]}[count]
        if count == 3 and self._three_fit:
            shapes = [*shapes, (3,), (1, 1, 1)]
        return [[kind] * n for n in draws.pick(shapes)], "", "", None

    def _two(self, rows: np.ndarray, held_out: bool, draws: Draws):
        axis, a, b = draws.pick(rows).tolist()
        counts, (least, most) = (1, 1), self.objects
        if least > 2 or (most > 2 and draws.uniform() < DOUBLED):
            shapes = ((1, 2), (2, 1), (2, 2))
            counts = draws.pick([shape for shape in shapes if least <= sum(shape) <= most])
        if not held_out and any(
            n > 1 and self._tables.count[n, kind] for n, kind in zip(counts, (a, b), strict=True)
        ):
            return None
        told = held_out or draws.uniform() >= UNTOLD
        relation = RELATIONS[axis] if told else "with"
        return [[a] * counts[0], [b] * counts[1]], RELATIONS[axis], relation, None

    def _row(self, rows: np.ndarray, held_out: bool, draws: Draws):
        axis, a, b = draws.pick(rows).tolist()
        third = draws.below(len(self.kinds))
        if third in (a, b):
            return None
        row = [third, a, b] if draws.below(2) else [a, b, third]
        shown = itertools.combinations(row, 2)
        if not held_out and any(self._tables.relation[axis][pair] for pair in shown):
            return None
        return [[kind] for kind in row], RELATIONS[axis], RELATIONS[axis], None


@dataclasses.dataclass(frozen=True)
class _Tables:
    """What is held out, and what shows on which ground, of K kinds.

    Attributes:
      relation: bool (2, K, K), [relation, a, b]: "a left of b" is held out.
      count: bool (5, K), from 2 on.
      ground: bool (K, G), of an object alone.
      shows: bool (K, G), whether the object can be seen on the ground, or nowhere better.
      contrast: float (K, G), the share of it that can.
    """

    relation: np.ndarray
    count: np.ndarray
    ground: np.ndarray
    shows: np.ndarray
    contrast: np.ndarray

    def grounds_of(self, kinds: list[int]) -> np.ndarray:
        """The grounds on which all these kinds show, or the best."""
        shown = np.flatnonzero(self.shows[kinds].all(0))
        return shown if len(shown) else self.contrast[kinds].min(0).argmax()[None]


@functools.lru_cache(maxsize=8)
def _tables(kinds: tuple[str, ...], fraction: float, chosen: tuple[str, ...] = ()) -> _Tables:
    if not 0 <= fraction < 1:
        raise ValueError(f"data.scenes: held out is a share of 0 … 1, below 1, not {fraction}")

    def table(*axes: tuple[Any, ...], wording: str) -> np.ndarray:
        held = [is_held_out(wording.format(*words), fraction) for words in itertools.product(*axes)]
        return np.array(held, bool).reshape([len(axis) for axis in axes])

    grounds = tuple(scene_text.GROUNDS)
    shares = np.stack([contrast(name) for name in kinds])
    if chosen:
        shares[:, [name not in chosen for name in grounds]] = -1.0  # below any share
    count = table(range(PER_SCENE + 1), kinds, wording="{} {}")
    count[:2] = False
    return _Tables(
        relation=table(RELATIONS, kinds, kinds, wording="{1} {0} {2}"),
        count=count,
        ground=table(kinds, grounds, wording="{} on {}"),
        shows=shares >= np.minimum(SHOWS, shares.max(1, keepdims=True)),
        contrast=shares,
    )
