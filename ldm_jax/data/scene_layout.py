"""Where the objects of a scene stand, and the numbers that it is drawn from."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

Shape = tuple[int, int]  # (height, width) in pixels
Corner = tuple[int, int]  # (top, left)


class Draws:
    """Numbers drawn for one scene. Many at once, as a call of numpy's generator is slow."""

    def __init__(self, *seed: int):
        self._rng = np.random.default_rng(seed)
        self._values = iter(())

    def uniform(self) -> float:
        """In 0 … 1, below 1."""
        for value in self._values:
            return value
        self._values = iter(self._rng.random(64).tolist())
        return next(self._values)

    def below(self, count: int) -> int:
        """In 0 … count − 1."""
        return int(self.uniform() * count)

    def pick(self, choices: Sequence[Any]) -> Any:
        """One of them."""
        return choices[self.below(len(choices))]


def fitting(sizes: Sequence[int], count: int, side: int, grid: int = 1) -> list[int]:
    """The sizes of which so many stand side by side on a canvas of `side` pixels, and still do
    where each begins at a multiple of `grid` pixels."""
    gap = _gap(side)
    return [
        size
        for size in sizes
        if count * size + (count + 1) * gap <= side
        and (count - 1) * -(-size // grid) * grid + size <= side
    ]


def place(
    lines: Sequence[Sequence[Shape]],
    side: int,
    vertical: bool,
    aligned: bool,
    draws: Draws,
    grid: int = 1,
) -> list[list[Corner]]:
    """Where objects begin that stand in lines, one line after another, without overlap.

    Args:
      lines: the shapes of the objects of each.
      side: of the canvas.
      vertical: whether the lines follow from top to bottom; otherwise from left to right. Each
        line stands across that direction.
      aligned: whether the middles of any two lines differ across that direction by at most a third
        of their distance along it.
      grid: objects begin at multiples of so many pixels.
    """
    while True:
        placed = _place(lines, side, vertical, aligned, draws)
        if grid == 1:
            return placed
        placed = [
            [(round(top / grid) * grid, round(left / grid) * grid) for top, left in line]
            for line in placed
        ]
        if _stands(lines, placed, side, vertical, aligned):
            return placed


def _stands(
    lines: Sequence[Sequence[Shape]],
    placed: Sequence[Sequence[Corner]],
    side: int,
    vertical: bool,
    aligned: bool,
) -> bool:
    """Whether lines that were moved are still as `place` promises."""
    turn = slice(None) if vertical else slice(None, None, -1)
    spans = [  # of each object: its begin and end along the direction, and across
        [
            [
                (begin, begin + length)
                for begin, length in zip(corner[turn], shape[turn], strict=True)
            ]
            for corner, shape in zip(corners, line, strict=True)
        ]
        for corners, line in zip(placed, lines, strict=True)
    ]
    if max(end for line in spans for span in line for _, end in span) > side:
        return False
    for line in spans:
        if any(end > begin for (_, (_, end)), (_, (begin, _)) in itertools.pairwise(line)):
            return False
    along = [(min(a for (a, _), _ in line), max(b for (_, b), _ in line)) for line in spans]
    if any(end > begin for (_, end), (begin, _) in itertools.pairwise(along)):
        return False
    across = [(line[0][1][0], line[-1][1][1]) for line in spans]
    return not aligned or all(
        3 * abs(sum(across[i]) - sum(across[j])) <= abs(sum(along[i]) - sum(along[j]))
        for i, j in itertools.combinations(range(len(spans)), 2)
    )


def _place(
    lines: Sequence[Sequence[Shape]], side: int, vertical: bool, aligned: bool, draws: Draws
) -> list[list[Corner]]:
    """`place` without a grid."""
    # Of each object, its length along the direction and across.
    lengths = [[shape if vertical else shape[::-1] for shape in line] for line in lines]
    thick = [max(along for along, _ in line) for line in lengths]
    begins = _spread(thick, side, draws)
    rows = [_spread([length for _, length in line], side, draws) for line in lengths]
    if aligned:
        middles = [begin + length / 2 for begin, length in zip(begins, thick, strict=True)]
        ends = [row[-1] + line[-1][1] for row, line in zip(rows, lengths, strict=True)]
        rows = _align(middles, rows, ends)
    placed = []
    for line, begin, length, row in zip(lengths, begins, thick, rows, strict=True):
        corners = [
            (begin + draws.below(length - along + 1), start)
            for (along, _), start in zip(line, row, strict=True)
        ]
        placed.append(corners if vertical else [corner[::-1] for corner in corners])
    return placed


def _align(middles: list[float], rows: list[list[int]], ends: list[int]) -> list[list[int]]:
    """Moves all lines towards the longest: two lines to within a quarter of their distance, of more
    each to within an eighth of the distance to the nearest. The rest of a third is for rounding."""
    longest = max(range(len(rows)), key=lambda i: ends[i] - rows[i][0])
    target = (rows[longest][0] + ends[longest]) / 2
    moved = []
    for i, (row, end) in enumerate(zip(rows, ends, strict=True)):
        nearest = min(abs(middles[i] - middle) for j, middle in enumerate(middles) if j != i)
        reach = nearest / (4 if len(rows) == 2 else 8)
        offset = (row[0] + end) / 2 - target
        # A shorter line that moves towards a longer one stays on the canvas.
        move = round(min(max(offset, -reach), reach) - offset)
        moved.append([start + move for start in row])
    return moved


def _spread(lengths: Sequence[int], side: int, draws: Draws) -> list[int]:
    """Where lengths in a row begin, with gaps that are drawn."""
    gap = _gap(side)
    slack = side - sum(lengths) - (len(lengths) + 1) * gap
    begins, at = [], gap
    for length, free in zip(lengths, sorted(draws.below(slack + 1) for _ in lengths), strict=True):
        begins.append(at + free)
        at += length + gap
    return begins


def _gap(side: int) -> int:
    """Pixels between objects, and between them and the edge, at least."""
    return side // 64
