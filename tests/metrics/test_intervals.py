"""Intervals hold what they promise: they cover, and their widths are those of many draws."""

import numpy as np
import pytest
from scipy.stats import binomtest

from ldm_jax.metrics.distance import kernel_distance
from ldm_jax.metrics.intervals import bootstrap, frechet_error, kernel_error, mean_interval, wilson
from ldm_jax.metrics.moments import frechet_of_moments, moments_of
from ldm_jax.metrics.pairs import between, centred, within


@pytest.mark.parametrize(("hits", "count"), [(0, 12), (3, 12), (12, 12), (700, 1000)])
def test_wilson_is_scipys(hits, count):
    expected = binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_of_nothing_there_is_no_interval():
    assert np.isnan(wilson(0, 0)).all() and np.isnan(mean_interval(np.zeros(0))).all()


def test_bootstrap_of_a_mean_and_of_a_ratio():
    values = np.random.default_rng(0).exponential(size=2000)
    low, high = mean_interval(values, replicates=1000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.006)
    assert mean_interval(values) == mean_interval(values) != mean_interval(values, seed=1)
    low, high = bootstrap((values, 2 * values), lambda a, b: a / b)
    assert low == pytest.approx(0.5) and high == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("count", "least", "most"), [(6, 1.0, 1.4), (12, 1.0, 1.4), (60, 0.85, 1.15)]
)
def test_error_of_the_frechet_distance(count, least, most):
    """By the bootstrap below twice as many pictures as features, by influence from there on."""
    random = np.random.default_rng(count)
    real = random.normal(size=(4000, 8))
    reference = moments_of([real])
    draws = [random.normal(0.5, 1.5, (count, 8)) for _ in range(300)]
    distances = [frechet_of_moments(moments_of([draw]), reference) for draw in draws]
    errors = [frechet_error(draw, reference) for draw in draws[:20]]
    assert least <= np.mean(errors) / np.std(distances) <= most


def test_error_of_the_kernel_distance():
    random = np.random.default_rng(0)
    real = random.normal(size=(300, 8))
    draws = [random.normal(0.4, 1.2, (60, 8)) for _ in range(200)]
    scatter = np.std([kernel_distance(draw, real) for draw in draws])
    drawn, real = [centred(d, np.zeros(8)) for d in draws], centred(real, np.zeros(8))
    errors = [kernel_error(within(d), between(d, real)) for d in drawn]
    assert np.mean(errors) == pytest.approx(scatter, rel=0.15)
