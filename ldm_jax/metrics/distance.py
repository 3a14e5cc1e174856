"""Distances between two sets of pictures, by the features (N, D) of any extractor.

All computations are NumPy on the host, in float64 but for the products of the kernel distance,
which are in the features' own type. Report each number with the extractor and the number of
pictures: both distances depend on the extractor, and the Fréchet distance decreases as N grows
(`floor` shows how far).
"""

import numpy as np

from ldm_jax.metrics.moments import frechet_of_moments, moments_of
from ldm_jax.metrics.pairs import Between, Within, between, centred, within


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to two sets (Heusel et al. 2017, eq. 6).

    |μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½), with covariances over N - 1. If both sets have more rows
    than columns it is that of their moments, which are computed block by block: 50,000 rows of
    2,048 take less than 1 GB beside the features. Else square roots stand for the covariances,
    Σ = RᵀR, and the last trace is the sum of the singular values of Ra Rbᵀ: the same number, real
    and exact even where Σ does not have full rank.

    Args:
      features_a, features_b: (N, D) and (M, D), two rows or more each.

    Raises:
      ValueError: a set has fewer than two rows, non-finite values or another width.
    """
    a, b = _check_features(features_a, features_b)
    if min(len(a), len(b)) > a.shape[1]:
        return frechet_of_moments(moments_of([a]), moments_of([b]))
    mean_a, root_a = _moments(a)
    mean_b, root_b = _moments(b)
    mixed = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    spread = np.square(root_a).sum() + np.square(root_b).sum() - 2 * mixed
    return float(np.square(mean_a - mean_b).sum() + spread)


def kernel_distance(
    features_a: np.ndarray,
    features_b: np.ndarray,
    subsets: int = 0,
    subset_size: int = 1000,
    seed: int = 0,
) -> float:
    """Kernel distance (KID): unbiased MMD² under (x·y / D + 1)³ (Bińkowski et al. 2018, eq. 4).

    Unbiased: two samples of one distribution give zero on average, so the value may be negative.

    Args:
      features_a, features_b: (N, D) and (M, D), two rows or more each.
      subsets: 0 takes all pairs; k averages over k random subsets of each set, as the paper does.
      subset_size: rows per subset, at most the smaller set's.
      seed: of the subsets.

    Raises:
      ValueError: as in `frechet_distance`, or a subset larger than a set or of fewer than two rows.
    """
    a, b = _check_features(features_a, features_b)
    if not subsets:
        return _mmd2(a, b)
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(f"subset_size {subset_size} must lie in [2, {min(len(a), len(b))}]")
    random = np.random.default_rng(seed)

    def draw(features: np.ndarray) -> np.ndarray:
        return features[random.choice(len(features), subset_size, replace=False)]

    return float(np.mean([_mmd2(draw(a), draw(b)) for _ in range(subsets)]))


def floor(features: np.ndarray, seed: int = 0) -> float:
    """Fréchet distance between two random halves of one set (N, D).

    This is the score of a perfect generator against N / 2 pictures: the metric cannot distinguish
    better models.
    """
    order = np.random.default_rng(seed).permutation(len(features))
    half = len(features) // 2
    return frechet_distance(features[order[:half]], features[order[half : 2 * half]])


def _check_features(*sets: np.ndarray) -> list[np.ndarray]:
    arrays = [np.asarray(features) for features in sets]
    shapes = [a.shape for a in arrays]
    if any(len(s) != 2 or s[0] < 2 or s[1] != shapes[0][-1] for s in shapes):
        raise ValueError(f"expected features (N, D) and (M, D), N and M at least 2, got {shapes}")
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError("features hold NaN or infinite values")
    return arrays


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and a root R (min(N, D), D) of the covariance, Σ = RᵀR."""
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    return mean, np.linalg.qr((features - mean) / np.sqrt(len(features) - 1), mode="r")


def mean_discrepancy(drawn: Within, real: Within, across: Between) -> float:
    """The unbiased MMD² of the kernels of all pairs of two sets (Bińkowski et al. 2018, eq. 4)."""
    within = (w.kernel.sum() / (len(w.kernel) * (len(w.kernel) - 1)) for w in (drawn, real))
    return float(sum(within) - 2 * across.kernel.mean() / len(real.kernel))


def _mmd2(a: np.ndarray, b: np.ndarray) -> float:
    parts = [centred(x, np.zeros(x.shape[1])) for x in (a, b)]
    return mean_discrepancy(*map(within, parts), between(*parts))
