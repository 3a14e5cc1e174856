"""Fréchet and kernel distance against closed forms, SciPy's matrix root and the double sum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from ldm_jax.metrics.distance import floor, frechet_distance, kernel_distance


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def with_moments(mean, covariance, n=50):
    """Rows whose sample mean and sample covariance are exactly the given ones."""
    x = normal((n, len(mean)))
    x -= x.mean(axis=0)
    x = np.linalg.qr(x)[0] * np.sqrt(n - 1)
    return x @ np.linalg.cholesky(covariance).T + mean


def textbook(a, b):
    """Heusel et al. 2017, eq. 6, as pytorch-fid computes it."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(cov_a @ cov_b).real
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root)


def test_frechet_of_diagonal_gaussians():
    a = with_moments([0.0, 1.0, 2.0], np.diag([1.0, 4.0, 9.0]))
    b = with_moments([1.0, 1.0, 0.0], np.diag([4.0, 4.0, 0.25]))
    expected = (1 + 0 + 4) + (1 + 0 + 2.5**2)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-10)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 150, 16), (500, 500, 48)])
def test_frechet_agrees_with_scipy(n, m, d):
    mixing = normal((d, d), seed=1)
    a, b = normal((n, d)) @ mixing, normal((m, d), seed=2) + 0.1
    np.testing.assert_allclose(frechet_distance(a, b), textbook(a, b), rtol=1e-9)


def test_frechet_with_fewer_pictures_than_features():
    a, b = normal((6, 3)), normal((7, 3), seed=1) * 2
    basis = np.linalg.qr(normal((40, 3), seed=2))[0]  # the same points in a space of 40 dimensions
    np.testing.assert_allclose(
        frechet_distance(a @ basis.T, b @ basis.T), frechet_distance(a, b), rtol=1e-10
    )
    apart = frechet_distance(a @ basis[:, :3].T, normal((5, 40), seed=3))
    assert np.isfinite(apart) and apart > 0


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 12), m=st.integers(2, 12), d=st.integers(1, 8), seed=st.integers(0, 2**32 - 1)
)
def test_frechet_is_a_distance(n, m, d, seed):
    a, b = normal((n, d), seed), normal((m, d), seed + 1)
    there, back = frechet_distance(a, b), frechet_distance(b, a)
    assert there >= -1e-9
    np.testing.assert_allclose(there, back, atol=1e-9)
    np.testing.assert_allclose(frechet_distance(a, a[::-1]), 0, atol=1e-9)
    np.testing.assert_allclose(frechet_distance(a + 3, b + 3), there, atol=1e-8)


def test_kernel_distance_is_the_double_sum():
    a, b = normal((5, 3)), normal((4, 3), seed=1)

    def kernel(x, y):
        return (x @ y / 3 + 1) ** 3

    def within(x):
        pairs = [kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]
        return np.mean(pairs)

    between = np.mean([kernel(x, y) for x in a for y in b])
    expected = within(a) + within(b) - 2 * between
    np.testing.assert_allclose(kernel_distance(a, b), expected, rtol=1e-12)


def test_kernel_distance_is_unbiased():
    same = [kernel_distance(normal((30, 4), 2 * s), normal((20, 4), 2 * s + 1)) for s in range(200)]
    standard_error = np.std(same) / np.sqrt(len(same))
    assert abs(np.mean(same)) < 4 * standard_error and min(same) < 0
    assert kernel_distance(normal((30, 4)), normal((20, 4), 1) + 1) > 20 * standard_error


def test_kernel_distance_of_subsets():
    a, b = normal((60, 4)), normal((50, 4), seed=1) + 0.5
    whole = kernel_distance(a, b)
    parts = kernel_distance(a, b, subsets=300, subset_size=25)
    np.testing.assert_allclose(parts, whole, rtol=0.1)
    assert parts == kernel_distance(a, b, subsets=300, subset_size=25)
    assert parts != kernel_distance(a, b, subsets=300, subset_size=25, seed=1)
    with pytest.raises(ValueError, match="subset_size 51"):
        kernel_distance(a, b, subsets=1, subset_size=51)


def test_floor_falls_with_more_pictures():
    x = normal((4001, 8))
    assert floor(x) < floor(x[:400]) < floor(x[:40])
    assert floor(x, seed=1) == floor(x, seed=1) != floor(x)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((5, 3)), np.zeros((5, 4)), "expected features"),
        (np.zeros((1, 3)), np.zeros((5, 3)), "expected features"),
        (np.zeros(5), np.zeros(5), "expected features"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "NaN"),
    ],
)
def test_bad_features_are_refused(distance, a, b, message):
    with pytest.raises(ValueError, match=message):
        distance(a, b)
