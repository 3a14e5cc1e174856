"""Precision, recall, density and coverage, and the Inception score, against their definitions."""

import numpy as np
import pytest

from ldm_jax.metrics import manifold, pairs
from ldm_jax.metrics.distance import kernel_distance
from ldm_jax.metrics.manifold import inception_score, manifold_metrics, pair_metrics


def by_definition(drawn, real, k):
    """Naeem et al. 2020, eq. 1 to 5, pair by pair."""

    def radius(x, i):
        return sorted(np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if j != i)[k - 1]

    within = np.array([[np.linalg.norm(y - x) for x in real] for y in drawn])
    reals = np.array([radius(real, i) for i in range(len(real))])
    fakes = np.array([radius(drawn, i) for i in range(len(drawn))])
    return {
        "precision": np.mean([np.any(row < reals) for row in within]),
        "recall": np.mean([np.any(column < fakes) for column in within.T]),
        "density": np.mean([np.sum(row < reals) / k for row in within]),
        "coverage": np.mean([column.min() < r for column, r in zip(within.T, reals, strict=True)]),
    }


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("tile", "strip"), [(7, 3), (8, 8), (2048, 128)])
def test_definitions(k, tile, strip, monkeypatch):
    monkeypatch.setattr(pairs, "TILE", tile)
    monkeypatch.setattr(pairs, "STRIP", strip)
    random = np.random.default_rng(k)
    drawn, real = random.normal(0.7, 1, (30, 3)) + 100, random.normal(0, 1, (40, 3)) + 100
    found, intervals = manifold_metrics(drawn, real, k)
    assert found == pytest.approx(by_definition(drawn, real, k), abs=1e-12)
    assert 0 < found["recall"] < 1
    assert all(low <= found[name] <= high for name, (low, high) in intervals.items())
    assert intervals.keys() == found.keys()
    both, intervals = pair_metrics(drawn, real, k)
    assert both == pytest.approx(found | {"kid": kernel_distance(drawn, real)}, rel=1e-6)
    assert intervals["kid"][0] < both["kid"] < intervals["kid"][1]


def test_few_pictures_have_a_kernel_distance_alone():
    x = np.random.default_rng(0).normal(size=(9, 4))
    assert pair_metrics(x[:5], x)[0].keys() == {"kid"}
    assert pair_metrics(x[:6], x)[0].keys() == {"kid", "precision", "recall", "density", "coverage"}


def test_sets_that_do_not_meet_and_the_same_set():
    x = np.random.default_rng(0).normal(size=(50, 4))
    assert set(manifold_metrics(x + 1000, x)[0].values()) == {0.0}
    same = manifold_metrics(x, x, neighbours=5)[0]
    assert same["precision"] == same["recall"] == same["coverage"] == 1.0


def test_one_cluster_of_two_is_precise_and_not_diverse():
    random = np.random.default_rng(0)
    near, far = random.normal(size=(200, 2)), random.normal(50, 1, (200, 2))
    found, _ = manifold_metrics(random.normal(size=(200, 2)), np.concatenate([near, far]))
    assert found["precision"] > 0.9 and found["density"] > 0.8
    assert found["recall"] == pytest.approx(0.5, abs=0.03)
    assert found["coverage"] == pytest.approx(0.5, abs=0.03)


def test_large_sets_have_no_intervals_of_halves(monkeypatch):
    monkeypatch.setattr(manifold, "PAIRS", 100)
    x = np.random.default_rng(0).normal(size=(50, 4))
    assert manifold_metrics(x, x)[1].keys() == {"precision", "density"}


def test_inception_score_of_sure_and_unsure_classes():
    """Sure of each of 4 classes alike: 4. Never sure: 1."""
    sure = np.tile(1000.0 * np.eye(4), (25, 1))
    mean, deviation = inception_score(sure, splits=1)
    assert mean == pytest.approx(4) and deviation == 0
    assert inception_score(np.zeros((50, 4)))[0] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"of 10 pictures or more, got \(5, 4\)"):
        inception_score(sure[:5])


@pytest.mark.parametrize(
    ("drawn", "real", "message"),
    [
        (np.zeros((9, 3)), np.zeros((9, 4)), "expected features"),
        (np.zeros((9, 3)), np.full((9, 3), np.nan), "NaN"),
        (np.zeros((5, 3)), np.zeros((9, 3)), "5 drawn and 9 real pictures: more than neighbours=5"),
    ],
)
def test_bad_features(drawn, real, message):
    with pytest.raises(ValueError, match=message):
        manifold_metrics(drawn, real)
