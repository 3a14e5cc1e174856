"""All pairs, tile by tile, against whole matrices."""

import numpy as np
import pytest

from ldm_jax.metrics import pairs
from ldm_jax.metrics.pairs import between, centred, within


@pytest.fixture(params=[(16, 5), (64, 64)])
def tiles(request, monkeypatch):
    monkeypatch.setattr(pairs, "TILE", request.param[0])
    monkeypatch.setattr(pairs, "STRIP", request.param[1])


def whole(x, y):
    x, y = np.float64(x), np.float64(y)
    kernel = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel, np.square(x[:, None] - y).sum(axis=2)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_as_of_whole_matrices(tiles, kind):
    """Features far from zero, as a network's often are."""
    random = np.random.default_rng(0)
    x, y = (random.normal(5, 1, (n, 6)).astype(kind) for n in (50, 37))
    centre = y.mean(axis=0)
    mine, theirs = centred(x, centre), centred(y, centre)
    near = dict(rtol=3e-6 if kind == np.float32 else 1e-12)
    kernel, squares = whole(x, x)
    np.fill_diagonal(kernel, 0)
    found = within(mine, 4)
    assert found.radii.dtype == kind
    np.testing.assert_allclose(found.kernel, kernel.sum(axis=1), **near)
    radii = np.sort(squares, axis=1)[:, 4]
    np.testing.assert_allclose(found.radii, radii, rtol=near["rtol"] * 10)
    kernel, squares = whole(x, y)
    other = np.sort(whole(y, y)[1], axis=1)[:, 4]
    found = between(mine, theirs, radii.astype(kind), other.astype(kind))
    np.testing.assert_allclose(found.kernel, kernel.sum(axis=1), **near)
    np.testing.assert_array_equal(found.balls, (squares < other).sum(axis=1))
    np.testing.assert_array_equal(found.covered, (squares < other).any(axis=0))
    np.testing.assert_array_equal(found.reached, (squares < radii[:, None]).any(axis=0))
    assert 0 < found.reached.sum() < len(y) and 0 < found.balls.sum() < squares.size
    np.testing.assert_allclose(pairs.distances(mine, theirs), squares, rtol=near["rtol"] * 10)


@pytest.mark.parametrize("order", [1, -1])
def test_neighbours_that_come_ever_nearer(tiles, order):
    """On a line, sorted: each tile has nearer ones than all before it, or none."""
    x = np.geomspace(1, 1e3, 70)[::order, None]
    expected = np.sort(np.square(x - x.T), axis=1)[:, 3]
    found = within(centred(x, x.mean(axis=0)), 3, kernel=False)
    np.testing.assert_allclose(found.radii, expected, rtol=1e-9)
    assert found.kernel.shape == (0,)


def test_rows_that_are_alike(tiles):
    x = centred(np.ones((40, 3)), np.zeros(3))
    found = within(x, 5)
    np.testing.assert_array_equal(found.radii, 0)
    np.testing.assert_allclose(found.kernel, 39 * 8)
    across = between(x, x, found.radii, found.radii)
    assert not across.balls.any() and not across.reached.any(), "a ball of radius 0 is empty"


def test_whole_numbers_are_measured_in_float64(tiles):
    x = np.arange(60).reshape(20, 3)
    assert within(centred(x, np.zeros(3)), 1).radii.dtype == np.float64
