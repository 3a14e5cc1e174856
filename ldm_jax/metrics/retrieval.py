"""Caption retrieval: whether the nearest training pictures of a generated one fit its prompt."""

from collections.abc import Sequence

import numpy as np


def caption_retrieval(
    generated: np.ndarray,
    training: np.ndarray,
    names: Sequence[str],
    groups: Sequence[str],
    prompt_names: Sequence[str],
    prompt_groups: Sequence[str],
) -> dict[str, float]:
    """Shares of generated pictures whose nearest training pictures fit the prompt.

    The similarity is the cosine of features; of equally similar pictures the first in `training`
    comes first.

    Args:
      generated: (B, D) features of the generated pictures.
      training: (N, D) features of the training pictures, by the same extractor.
      names, groups: of the N training pictures. A name may occur more than once.
      prompt_names, prompt_groups: of the B prompts: the picture and the group that each describes.

    Returns:
      Shares in [0, 1]: `r@1` and `r@5`, the prompt's own picture is among the 1 or 5 nearest;
      `group` and `group@5`, a picture of the prompt's group is. Chance for `r@k` is k / N.

    Raises:
      ValueError: lengths do not match, or a prompt's picture is not among the training pictures.
    """
    generated, training = np.asarray(generated), np.asarray(training)
    if not len(training) == len(names) == len(groups) or len(training) == 0:
        raise ValueError(f"{len(training)} features, {len(names)} names and {len(groups)} groups")
    if not len(generated) == len(prompt_names) == len(prompt_groups) or len(generated) == 0:
        raise ValueError(
            f"{len(generated)} generated pictures, {len(prompt_names)} prompt names "
            f"and {len(prompt_groups)} prompt groups"
        )
    unknown = sorted(set(prompt_names) - set(names))
    if unknown:
        raise ValueError(f"prompts ask for pictures that are not in training: {unknown[:3]}")

    similarity = _unit(generated) @ _unit(training).T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :5]
    own = np.asarray(names)[nearest] == np.asarray(prompt_names)[:, None]
    group = np.asarray(groups)[nearest] == np.asarray(prompt_groups)[:, None]
    return {
        "r@1": float(own[:, 0].mean()),
        "r@5": float(own.any(axis=1).mean()),
        "group": float(group[:, 0].mean()),
        "group@5": float(group.any(axis=1).mean()),
    }


def _unit(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
