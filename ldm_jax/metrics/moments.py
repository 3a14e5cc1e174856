"""Mean and covariance of features that come in blocks, and the Fréchet distance of two of them."""

import dataclasses
from collections.abc import Iterable

import numpy as np

BLOCK = 2048  # rows in float64 at once


@dataclasses.dataclass(frozen=True)
class Moments:
    """The number of rows, their mean (D,) and their covariance (D, D) over count − 1, float64."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray


def moments_of(blocks: Iterable[np.ndarray]) -> Moments:
    """Of features in blocks (n, D): in one pass, exact in float64 (Chan et al. 1979, eq. 2.1), in
    memory for a block and two matrices.

    Raises:
      ValueError: fewer than two rows, blocks of several widths, or values that are not finite.
    """
    count, mean, scatter = 0, None, None
    for block in blocks:
        for start in range(0, len(block), BLOCK):
            part = np.asarray(block[start : start + BLOCK], np.float64)
            if part.ndim != 2 or mean is not None and part.shape[1] != len(mean):
                raise ValueError(f"expected features (n, D) of one width, got {part.shape}")
            if not np.isfinite(part).all():
                raise ValueError("features hold NaN or infinite values")
            own = part.mean(axis=0)
            part = part - own
            if mean is None:
                count, mean, scatter = len(part), own, part.T @ part
                continue
            apart, total = own - mean, count + len(part)
            scatter += part.T @ part
            scatter += np.outer(apart, apart) * (count * len(part) / total)
            mean = mean + apart * (len(part) / total)
            count = total
    if count < 2:
        raise ValueError(f"moments need two pictures or more, got {count}")
    return Moments(count, mean, scatter / (count - 1))


def frechet_of_moments(a: Moments, b: Moments) -> float:
    """Fréchet distance of two Gaussians (Heusel et al. 2017, eq. 6):
    |μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½).

    The last trace is that of (Σa^½ Σb Σa^½)^½, whose eigenvalues are real, and which exists for
    every pair of covariances.

    Raises:
      ValueError: the widths differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of widths {len(a.mean)} and {len(b.mean)} have no distance")
    root = root_of(a.covariance)
    mixed = np.linalg.eigvalsh(root @ b.covariance @ root)
    spread = np.trace(a.covariance) + np.trace(b.covariance)
    # Beside the largest, what is this small is rounding, and its root would not be small.
    there = mixed > mixed[-1] * len(mixed) * np.finfo(np.float64).eps
    spread -= 2 * np.sqrt(mixed[there]).sum()
    return float(np.square(a.mean - b.mean).sum() + spread)


def root_of(covariance: np.ndarray, power: float = 0.5) -> np.ndarray:
    """A power of a symmetric matrix without negative eigenvalues; directions without any variance
    stay without."""
    values, vectors = np.linalg.eigh(covariance)
    there = values > values[-1] * len(values) * np.finfo(np.float64).eps
    powers = np.where(there, np.where(there, values, 1.0) ** power, 0.0)
    return (vectors * powers) @ vectors.T
