"""Distances between two sets of pictures, by the features (N, D) of any extractor.

All computations are float64 NumPy on the host. Report each number with the extractor and the number
of pictures: both distances depend on the extractor, and the Fréchet distance decreases as N grows
(`floor` shows how far).
"""

import numpy as np


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to two sets (Heusel et al. 2017, eq. 6).

    |μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½), with covariances over N - 1. Written with square roots
    instead of covariances, Σ = RᵀR, the last trace is the sum of the singular values of Ra Rbᵀ: the
    same number, real and exact even if N < D, where Σ does not have full rank.

    Args:
      features_a, features_b: (N, D) and (M, D), two rows or more each.

    Raises:
      ValueError: a set has fewer than two rows, non-finite values or another width.
    """
    a, b = _check_features(features_a, features_b)
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
    arrays = [np.asarray(features, np.float64) for features in sets]
    shapes = [a.shape for a in arrays]
    if any(len(s) != 2 or s[0] < 2 or s[1] != shapes[0][-1] for s in shapes):
        raise ValueError(f"expected features (N, D) and (M, D), N and M at least 2, got {shapes}")
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError("features hold NaN or infinite values")
    return arrays


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and a root R (min(N, D), D) of the covariance, Σ = RᵀR."""
    mean = features.mean(axis=0)
    return mean, np.linalg.qr((features - mean) / np.sqrt(len(features) - 1), mode="r")


def _mmd2(a: np.ndarray, b: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_off_diagonal(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    within = mean_off_diagonal(kernel(a, a)) + mean_off_diagonal(kernel(b, b))
    return float(within - 2 * kernel(a, b).mean())
