"""Fidelity and diversity apart: precision, recall, density and coverage, and the Inception score.

A set of features spans a manifold, the union of the balls around each that reach to its k-th
nearest neighbour of the same set. Distances are made block by block, in the features' own type.
"""

from collections.abc import Iterator

import numpy as np

from ldm_jax.metrics.intervals import Interval, around, mean_interval, wilson

NEIGHBOURS = 5
BLOCK = 4096
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
    radii_real, radii_drawn = (_radii(x, neighbours) for x in (real, drawn))
    inside, balls = np.zeros(len(drawn), bool), np.zeros(len(drawn))
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, distances in _distances(drawn, real):
        hit = distances < radii_real
        inside[rows], balls[rows] = hit.any(axis=1), hit.sum(axis=1)
        covered |= hit.any(axis=0)
        recalled |= (distances < radii_drawn[rows, None]).any(axis=0)
    density = balls / neighbours
    metrics = {
        "precision": float(inside.mean()),
        "recall": float(recalled.mean()),
        "density": float(density.mean()),
        "coverage": float(covered.mean()),
    }
    intervals = {
        "precision": wilson(int(inside.sum()), len(inside)),
        "density": mean_interval(density, seed=seed),
    }
    enough = len(drawn) // 2 > neighbours and max(len(drawn), len(real)) * len(drawn) <= PAIRS
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


def _checked(drawn: np.ndarray, real: np.ndarray, neighbours: int) -> list[np.ndarray]:
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
    centre = sets[1].mean(axis=0)  # small numbers lose less in |x|² + |y|² − 2 x·y
    return [x - centre for x in sets]


def _distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of rows of x, and their squared distances to all of y."""
    squares = np.square(y).sum(axis=1)
    for start in range(0, len(x), BLOCK):
        rows = slice(start, min(start + BLOCK, len(x)))
        distances = x[rows] @ y.T
        distances *= -2
        distances += squares
        distances += np.square(x[rows]).sum(axis=1)[:, None]
        yield rows, np.maximum(distances, 0, out=distances)


def _radii(x: np.ndarray, neighbours: int) -> np.ndarray:
    """The squared distance of each row to its k-th nearest other row."""
    radii = np.empty(len(x), x.dtype)
    for rows, distances in _distances(x, x):
        distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = -1  # itself
        radii[rows] = np.partition(distances, neighbours, axis=1)[:, neighbours]
    return radii


def _spread_of_halves(
    drawn: np.ndarray, real: np.ndarray, radii_real: np.ndarray, neighbours: int, seed: int
) -> np.ndarray:
    """Standard deviations of recall and coverage over random halves of the drawn pictures."""
    between = np.concatenate([d for _, d in _distances(drawn, real)])
    within = np.concatenate([d for _, d in _distances(drawn, drawn)])
    np.fill_diagonal(within, -1)
    random, found = np.random.default_rng(seed), []
    for _ in range(HALVES):
        half = random.choice(len(drawn), len(drawn) // 2, replace=False)
        own = np.partition(within[np.ix_(half, half)], neighbours, axis=1)[:, neighbours]
        nearest = between[half]
        recalled = (nearest < own[:, None]).any(axis=0).mean()
        found.append((recalled, (nearest.min(axis=0) < radii_real).mean()))
    return np.std(found, axis=0)
