"""Moments in blocks against NumPy's, and the distance of known Gaussians."""

import numpy as np
import pytest

from ldm_jax.metrics.distance import frechet_distance
from ldm_jax.metrics.moments import Moments, frechet_of_moments, moments_of


def test_moments_of_blocks():
    x = np.random.default_rng(0).normal(3, 2, (5000, 7)).astype(np.float32)
    found = moments_of(x[a:b] for a, b in ((0, 1), (1, 1), (1, 4000), (4000, 5000)))
    assert found.count == 5000
    wide = x.astype(np.float64)
    np.testing.assert_allclose(found.mean, wide.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(wide, rowvar=False), rtol=1e-10)


def test_a_far_mean_costs_no_digits():
    """In one pass over squares the variance would be lost: 1e8² has no room for 1 beside it."""
    x = np.random.default_rng(0).normal(1e8, 1, (300, 2))
    np.testing.assert_allclose(
        moments_of([x[:100], x[100:]]).covariance, np.cov(x, rowvar=False), rtol=1e-6
    )


def test_frechet_of_known_gaussians():
    a = Moments(9, np.array([0.0, 1.0]), np.diag([1.0, 9.0]))
    b = Moments(9, np.array([2.0, 1.0]), np.diag([4.0, 0.0]))
    assert frechet_of_moments(a, b) == pytest.approx(4 + (2 - 1) ** 2 + 9)
    assert frechet_of_moments(b, a) == pytest.approx(4 + 1 + 9)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    turned = [Moments(9, turn @ m.mean, turn @ m.covariance @ turn.T) for m in (a, b)]
    assert frechet_of_moments(*turned) == pytest.approx(14)


def test_both_ways_of_the_distance_agree():
    """20 rows of 12 columns go by moments; padded with zeros to 40 columns, by roots."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(20, 12)), random.normal(1, 2, size=(30, 12))
    wide = [np.pad(x, ((0, 0), (0, 28))) for x in (a, b)]
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(*wide), rel=1e-9)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([], "two pictures or more, got 0"),
        ([np.zeros((1, 3))], "two pictures or more, got 1"),
        ([np.zeros((2, 3)), np.zeros((2, 4))], r"one width, got \(2, 4\)"),
        ([np.full((2, 3), np.inf)], "NaN or infinite"),
    ],
)
def test_bad_features(blocks, message):
    with pytest.raises(ValueError, match=message):
        moments_of(blocks)


def test_widths_must_agree():
    narrow, wide = (Moments(9, np.zeros(n), np.eye(n)) for n in (2, 3))
    with pytest.raises(ValueError, match="widths 2 and 3"):
        frechet_of_moments(narrow, wide)
