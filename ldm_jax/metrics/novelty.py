"""Whether a model's pictures are new, or copies of pictures that it was trained on."""

import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import ks_2samp

NEAR = 0.01  # the share of fresh pictures that are as near to a training picture as a copy


def novelty(drawn: np.ndarray, fresh: np.ndarray, training: np.ndarray) -> dict[str, float]:
    """Compares the distances of drawn pictures to their nearest training pictures with the same
    distances of fresh pictures, which are real and were not trained on.

    Args:
      drawn, fresh, training: features (N, D), (M, D) and (T, D).

    Returns:
      `copied`: the share of the drawn pictures that are nearer to a training picture than all but
      1 % of the fresh ones. It is 0.01 if the pictures are as new as fresh ones, and near 1 if they
      are training pictures. `novelty_p`: the p-value of the two-sample Kolmogorov-Smirnov test that
      both distances have one distribution.
    """
    tree = cKDTree(training)
    own, real = (tree.query(features)[0] for features in (drawn, fresh))
    return {
        "copied": float(np.mean(own < np.quantile(real, NEAR))),
        "novelty_p": float(ks_2samp(own, real).pvalue),
    }
