"""How sure a number is: 95 % intervals for another draw of as many pictures by the same model.

What a metric is compared with, reference pictures or captions, counts as given.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ldm_jax.metrics.moments import Moments, moments_of, root_of
from ldm_jax.metrics.pairs import Between, Within

Interval = tuple[float, float]
Z = 1.959963984540054  # of 95 %
REPLICATES = 200


def around(value: float, error: float, lowest: float = -np.inf, highest: float = np.inf):
    """value ± 1.96 standard errors, within what the metric can be."""
    low, high = value - Z * error, value + Z * error
    return float(max(low, lowest)), float(min(high, highest))


def wilson(hits: int, count: int) -> Interval:
    """Of a share, `hits` of `count` (Wilson 1927): it stays within 0 … 1, and has a width even if
    all hit. NaN of none."""
    if not count:
        return float("nan"), float("nan")
    share, square = hits / count, Z**2 / count
    middle = share + square / 2
    reach = Z * np.sqrt(share * (1 - share) / count + square / (4 * count))
    low, high = (middle - reach) / (1 + square), (middle + reach) / (1 + square)
    return float(low) if hits else 0.0, float(high) if hits < count else 1.0


def bootstrap(
    parts: Sequence[np.ndarray],
    of: Callable[..., float],
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Interval:
    """Of a function of sums over pictures, by the percentiles of the bootstrap (Efron 1979).

    Args:
      parts: arrays (N, …), one row for each picture.
      of: a function of their sums over the pictures.
    """
    found = []
    for weights in _weights(len(parts[0]), replicates, seed):
        found.append(of(*(np.tensordot(weights, part, 1) for part in parts)))
    low, high = np.nanquantile(found, (0.025, 0.975))
    return float(low), float(high)


def mean_interval(values: np.ndarray, replicates: int = REPLICATES, seed: int = 0) -> Interval:
    """Of the mean of values (N,), by the bootstrap; NaN of none."""
    if not len(values):
        return float("nan"), float("nan")
    parts = (np.asarray(values, np.float64), np.ones(len(values)))
    return bootstrap(parts, lambda total, count: total / count, replicates, seed)


def kernel_error(drawn: Within, across: Between) -> float:
    """Standard error of the kernel distance, to first order: 2 sd(h) / √N, where hᵢ is the mean
    kernel of drawn picture i with the others less that with the real ones.

    Args:
      drawn, across: the kernels of all pairs of drawn pictures, and of these and the real ones.
    """
    count = len(drawn.kernel)
    h = drawn.kernel / (count - 1) - across.kernel / len(across.covered)
    return float(2 * np.std(h, ddof=1) / np.sqrt(count))


def frechet_error(
    drawn: np.ndarray, reference: Moments, replicates: int = 100, seed: int = 0
) -> float:
    """Standard error of the Fréchet distance of drawn features (N, D).

    From 2 D pictures on it is that of the influence of each picture on the distance: with the
    optimal map T = Σa^−½ (Σa^½ Σb Σa^½)^½ Σa^−½,

        φ(x) = 2 (x − μa)·(μa − μb) + (x − μa)ᵀ (I − T) (x − μa),

    the derivative by the drawn distribution, it is sd(φ) / √N. With fewer, where Σa has hardly any
    inverse, it is the standard deviation over `replicates` of the bootstrap, which is then larger
    than that of other draws, by a fifth at 1.5 D.
    """
    drawn = np.asarray(drawn)
    if len(drawn) < 2 * drawn.shape[1]:
        return _resampled_frechet(drawn, reference, replicates, seed)
    own = moments_of([drawn])
    root, inverse = root_of(own.covariance), root_of(own.covariance, -0.5)
    shape = np.eye(len(root)) - inverse @ root_of(root @ reference.covariance @ root) @ inverse
    influence = np.empty(len(drawn))
    for start in range(0, len(drawn), 2048):
        x = drawn[start : start + 2048].astype(np.float64) - own.mean
        influence[start : start + 2048] = 2 * x @ (own.mean - reference.mean)
        influence[start : start + 2048] += np.einsum("nd,nd->n", x @ shape, x)
    return float(np.std(influence) / np.sqrt(len(drawn)))


def _resampled_frechet(drawn: np.ndarray, reference: Moments, replicates: int, seed: int) -> float:
    """All in products of pictures with each other, which do not grow with the width."""
    count = len(drawn)
    mean = drawn.mean(axis=0, dtype=np.float64)
    x = drawn.astype(np.float64) - mean
    products, mixed = x @ x.T, x @ reference.covariance @ x.T
    apart = mean - reference.mean
    towards = x @ apart
    found = []
    for weights in _weights(count, replicates, seed):
        share = weights / count
        shift = share @ products @ share
        spread = (weights @ np.diag(products) - count * shift) / (count - 1)
        there = weights > 0
        rows = mixed @ share
        gram = mixed - rows[:, None] - rows + share @ rows
        scale = np.sqrt(weights[there] / (count - 1))
        gram = gram[np.ix_(there, there)] * scale * scale[:, None]
        root = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None)).sum()
        found.append(shift + 2 * share @ towards + spread - 2 * root)
    return float(np.std(found, ddof=1))


def _weights(count: int, replicates: int, seed: int):
    """How often each of `count` pictures is drawn with replacement, again and again."""
    random = np.random.default_rng(seed)
    for _ in range(replicates):
        drawn = random.integers(count, size=count)
        yield np.bincount(drawn, minlength=count).astype(np.float64)
