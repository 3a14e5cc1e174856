"""Fidelity and diversity apart: precision, recall, density and coverage, and the Inception score.

A set of features spans a manifold, the union of the balls around each that reach to its k-th
nearest neighbour of the same set.
"""

import numpy as np

from ldm_jax.metrics.distance import mean_discrepancy
from ldm_jax.metrics.intervals import Interval, around, kernel_error, mean_interval, wilson
from ldm_jax.metrics.pairs import Between, Features, between, centred, distances, within

NEIGHBOURS = 5
HALVES = 100
PAIRS = 25_000_000  # distances between two sets that are kept for the intervals of their halves


def manifold_metrics(
    drawn: np.ndarray, real: np.ndarray, neighbours: int = NEIGHBOURS, seed: int = 0
) -> tuple[dict[str, float], dict[str, Interval]]:
    """Metrics of drawn features (N, D) beside real ones (M, D), and 95 % intervals.

    - `precision`: the share of drawn pictures in the real manifold, and `recall`: of real pictures
      in the drawn one (Kynkäänniemi et al. 2019, eq. 1 to 3, who take 3 neighbours);
    - `density`: in how many real balls a drawn picture is, over `neighbours`, and `coverage`: the
      share of real balls that hold a drawn picture (Naeem et al. 2020, eq. 3 and 5).

    Intervals are for another draw of as many pictures, the real ones being as they are: Wilson's of
    precision, the bootstrap's of density, and of recall and coverage by random halves of the drawn
    pictures, whose variance is that of the whole (Shao & Wu 1989); these two have none beyond
    25 million pairs.

    Raises:
      ValueError: other shapes, values that are not finite, or not more rows than neighbours.
    """
    drawn, real = _checked(drawn, real, neighbours)
    radii = [within(x, neighbours, kernel=False).radii for x in (drawn, real)]
    across = between(drawn, real, *radii, kernel=False)
    return _of_balls(drawn, real, radii[1], across, neighbours, seed)


def pair_metrics(
    drawn: np.ndarray, real: np.ndarray, neighbours: int = NEIGHBOURS, seed: int = 0
) -> tuple[dict[str, float], dict[str, Interval]]:
    """`kid`, as `distance.kernel_distance`, and those of `manifold_metrics`, which are left out of
    sets of no more than `neighbours`, with intervals: both from one pass over all pairs.

    Raises:
      ValueError: other shapes, fewer than two rows, or values that are not finite.
    """
    enough = min(len(drawn), len(real)) > neighbours
    drawn, real = _checked(drawn, real, neighbours if enough else 1)
    found = [within(x, neighbours if enough else 0) for x in (drawn, real)]
    radii = [each.radii for each in found] if enough else [None, None]
    across = between(drawn, real, *radii)
    metrics = {"kid": mean_discrepancy(*found, across)}
    intervals = {"kid": around(metrics["kid"], kernel_error(found[0], across))}
    if enough:
        more, their_intervals = _of_balls(drawn, real, radii[1], across, neighbours, seed)
        metrics, intervals = metrics | more, intervals | their_intervals
    return metrics, intervals


def _of_balls(
    drawn: Features,
    real: Features,
    radii_real: np.ndarray,
    across: Between,
    neighbours: int,
    seed: int,
) -> tuple[dict[str, float], dict[str, Interval]]:
    inside, density = across.balls > 0, across.balls / neighbours
    metrics = {
        "precision": float(inside.mean()),
        "recall": float(across.reached.mean()),
        "density": float(density.mean()),
        "coverage": float(across.covered.mean()),
    }
    intervals = {
        "precision": wilson(int(inside.sum()), len(inside)),
        "density": mean_interval(density, seed=seed),
    }
    counts = [len(each.x) for each in (drawn, real)]
    enough = counts[0] // 2 > neighbours and max(counts) * counts[0] <= PAIRS
    if enough:
        spread = _spread_of_halves(drawn, real, radii_real, neighbours, seed)
        for name, error in zip(("recall", "coverage"), spread, strict=True):
            intervals[name] = around(metrics[name], error, 0.0, 1.0)
    return metrics, intervals


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """exp E KL(p(y|x) ‖ p(y)) of logits (N, classes): mean and standard deviation over `splits`
    (Salimans et al. 2016, §4), in the order of torch-fidelity.

    Raises:
      ValueError: fewer pictures than splits, or values that are not finite.
    """
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or len(logits) < splits or not np.isfinite(logits).all():
        raise ValueError(
            f"expected finite logits (N, classes) of {splits} pictures or more, got {logits.shape}"
        )
    logits = logits[np.random.RandomState(seed).permutation(len(logits))]
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        p = np.exp(part)
        divergence = (p * (part - np.log(p.mean(axis=0) + 1e-300))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))


def _checked(drawn: np.ndarray, real: np.ndarray, neighbours: int) -> list[Features]:
    sets = [np.asarray(x) for x in (drawn, real)]
    if any(x.ndim != 2 or x.shape[1] != sets[0].shape[-1] for x in sets):
        raise ValueError(f"expected features (N, D) and (M, D), got {[x.shape for x in sets]}")
    if not all(np.isfinite(x).all() for x in sets):
        raise ValueError("features hold NaN or infinite values")
    if neighbours < 1 or min(map(len, sets)) <= neighbours:
        raise ValueError(
            f"{len(sets[0])} drawn and {len(sets[1])} real pictures: more than "
            f"neighbours={neighbours} of each are needed, and one neighbour"
        )
    centre = sets[1].mean(axis=0)
    return [centred(x, centre) for x in sets]


def _spread_of_halves(
    drawn: Features, real: Features, radii_real: np.ndarray, neighbours: int, seed: int
) -> np.ndarray:
    """Standard deviations of recall and coverage over random halves of the drawn pictures."""
    across, own_distances = distances(drawn, real), distances(drawn, drawn)
    np.fill_diagonal(own_distances, -1)
    random, found = np.random.default_rng(seed), []
    for _ in range(HALVES):
        half = random.choice(len(across), len(across) // 2, replace=False)
        own = np.partition(own_distances[np.ix_(half, half)], neighbours, axis=1)[:, neighbours]
        nearest = across[half]
        recalled = (nearest < own[:, None]).any(axis=0).mean()
        found.append((recalled, (nearest.min(axis=0) < radii_real).mean()))
    return np.std(found, axis=0)
