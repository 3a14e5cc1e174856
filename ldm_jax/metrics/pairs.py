"""What all pairs of two sets of features say: kernels, nearest neighbours, who is in whose ball.

The products of features are made tile by tile in the features' own type, each once: those within a
set for both of a pair. Memory is for the features, a copy of them, and a few tiles.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

TILE = 2048  # rows and columns of products at once
STRIP = 128  # rows of them that are worked on at once, small enough for a processor's cache


class Features(NamedTuple):
    """Features (N, D) less a `centre` (D,), because small numbers lose less in
    |x|² + |y|² − 2 x·y; `squares`: |x|² of those; `products`: of those with the centre, and half
    the centre's square more, float64 (N,), which make x·y of the features themselves again."""

    x: np.ndarray
    squares: np.ndarray
    products: np.ndarray


class Within(NamedTuple):
    """Of each row: the sum of its kernels with the others, float64 (N,), and the squared distance
    to its k-th nearest other, (N,)."""

    kernel: np.ndarray
    radii: np.ndarray


class Between(NamedTuple):
    """Of rows x and y: the sum of each x's kernels with all y, float64 (N,); in how many balls of y
    each x is, (N,); whether each y is in a ball of x; whether the ball of each y holds an x."""

    kernel: np.ndarray
    balls: np.ndarray
    reached: np.ndarray
    covered: np.ndarray


def centred(features: np.ndarray, centre: np.ndarray) -> Features:
    """Features (N, D) for the functions below; of two sets with the same centre."""
    kind = features.dtype if features.dtype.kind == "f" else np.dtype(np.float64)
    kind = np.promote_types(kind, np.float32)
    x = np.subtract(features, centre, dtype=kind)
    half = np.square(centre, dtype=np.float64).sum() / 2
    products = x @ np.asarray(centre, kind)
    return Features(x, np.einsum("nd,nd->n", x, x), products.astype(np.float64) + half)


def within(own: Features, neighbours: int = 0, kernel: bool = True) -> Within:
    """Of all pairs of a set, but for a row with itself. `neighbours`: 0 leaves the radii out, and
    not `kernel` the kernels: they are empty then."""
    count = len(own.x)
    sums = np.zeros(count if kernel else 0)
    nearest = np.full((count if neighbours else 0, neighbours), np.inf, own.x.dtype)
    for rows, columns, products in _tiles(own.x, own.x, half=True):
        itself = None
        if rows.start >= columns.start:  # a tile on the diagonal, which has its pairs twice
            itself = np.arange(len(products)), np.arange(rows.start, rows.stop) - columns.start
        if kernel:
            found = _kernel(products, own, own, rows, columns)
            if itself is None:
                sums[columns] += found.sum(axis=0)
            else:
                found[itself] = 0
            sums[rows] += found.sum(axis=1)
        if neighbours:
            apart = _distances(products, own, own, rows, columns)
            if itself is None:
                _keep(nearest[columns], apart, axis=0)
            else:
                apart[itself] = np.inf
            _keep(nearest[rows], apart, axis=1)
    return Within(sums, nearest.max(axis=1) if neighbours else nearest[:, 0:0].reshape(-1))


def between(
    x: Features,
    y: Features,
    radii_x: np.ndarray | None = None,
    radii_y: np.ndarray | None = None,
    kernel: bool = True,
) -> Between:
    """Of all pairs of two sets. Without `radii`, squares, nothing is in a ball."""
    sums, balls = np.zeros(len(x.x) if kernel else 0), np.zeros(len(x.x), np.int64)
    reached, covered = np.zeros(len(y.x), bool), np.zeros(len(y.x), bool)
    for rows, columns, products in _tiles(x.x, y.x):
        if kernel:
            sums[rows] += _kernel(products, x, y, rows, columns).sum(axis=1)
        if radii_x is None or radii_y is None:
            continue
        apart = _distances(products, x, y, rows, columns)
        row, column = _where(apart < radii_y[columns])
        balls[rows] += np.bincount(row, minlength=len(apart))
        covered[columns][column] = True
        reached[columns] |= (apart < radii_x[rows, None]).any(axis=0)
    return Between(sums, balls, reached, covered)


def distances(x: Features, y: Features) -> np.ndarray:
    """The squared distances of all rows of two sets of a common centre, (N, M), at once."""
    everything = slice(None)
    return _distances(x.x @ y.x.T, x, y, everything, everything)


def _tiles(
    x: np.ndarray, y: np.ndarray, half: bool = False
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Rows, columns and their products. `half`: of x = y, where a pair comes once."""
    tile = np.empty((min(TILE, len(x)), min(TILE, len(y))), x.dtype)
    for i in range(0, len(x), TILE):
        for j in range(i if half else 0, len(y), TILE):
            rows, columns = x[i : i + TILE], slice(j, min(j + TILE, len(y)))
            products = tile[: len(rows), : columns.stop - j]
            np.matmul(rows, y[columns].T, out=products)
            for start in range(0, len(rows), STRIP):
                strip = products[start : start + STRIP]
                yield slice(i + start, i + start + len(strip)), columns, strip


def _kernel(products: np.ndarray, x: Features, y: Features, rows: slice, columns: slice):
    """(x·y / D + 1)³ of the features themselves (Bińkowski et al. 2018, §4)."""
    width, kind = x.x.shape[1], products.dtype
    one = products * kind.type(1 / width)
    one += (x.products[rows, None] / width + 1).astype(kind)
    one += (y.products[columns] / width).astype(kind)
    cubes = one * one
    cubes *= one
    return cubes


def _distances(products: np.ndarray, x: Features, y: Features, rows: slice, columns: slice):
    """|x − y|², in place of the products."""
    products *= -2
    products += y.squares[columns]
    products += x.squares[rows, None]
    return np.maximum(products, 0, out=products)


def _where(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of what is true in an array that is mostly false."""
    return np.divmod(np.flatnonzero(mask), mask.shape[1])


def _keep(nearest: np.ndarray, distances: np.ndarray, axis: int) -> None:
    """Replaces the k smallest that each row (axis 1) or column (axis 0) had so far, (N, k)."""
    count = nearest.shape[1]
    furthest = nearest.max(axis=1)
    if np.isinf(furthest).any() and distances.shape[axis] >= count:
        both = np.concatenate([nearest, distances if axis else distances.T], axis=1)
        nearest[:] = np.partition(both, count - 1, axis=1)[:, :count]
        return
    row, column = _where(distances < (furthest[:, None] if axis else furthest))
    values = distances[row, column]
    owner = row if axis else column
    if not axis:
        order = np.argsort(owner, kind="stable")
        owner, values = owner[order], values[order]
    each = np.bincount(owner, minlength=len(nearest))
    touched = np.flatnonzero(each)
    if not len(touched):
        return
    place = np.arange(len(owner)) - np.repeat(np.cumsum(each) - each, each)
    new = np.full((len(touched), each.max()), np.inf, distances.dtype)
    new[np.searchsorted(touched, owner), place] = values
    both = np.concatenate([nearest[touched], new], axis=1)
    nearest[touched] = np.partition(both, count - 1, axis=1)[:, :count]
