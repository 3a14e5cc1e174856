"""Retrieval shares worked out by hand on a ring of unit vectors."""

import numpy as np
import pytest

from ldm_jax.metrics.retrieval import caption_retrieval

NAMES = [f"p{i}" for i in range(8)]
GROUPS = ["warm"] * 4 + ["cold"] * 4


def ring(degrees):
    angle = np.radians(np.asarray(degrees, float))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


TRAINING = ring(np.arange(8) * 45) * np.arange(1, 9)[:, None]  # lengths must not matter


def retrieve(degrees, prompts):
    groups = [GROUPS[NAMES.index(p)] for p in prompts]
    return caption_retrieval(ring(degrees), TRAINING, NAMES, GROUPS, prompts, groups)


def test_perfect_pictures():
    assert retrieve(np.arange(8) * 45 + 5, NAMES) == {"r@1": 1, "r@5": 1, "group": 1, "group@5": 1}


def test_shares_worked_out_by_hand():
    # At 1° the order is p0 p1 p7 p2 p6 | p3 p5 p4.
    shares = retrieve([1, 1, 1, 1], ["p0", "p1", "p6", "p4"])
    assert shares == {"r@1": 0.25, "r@5": 0.75, "group": 0.5, "group@5": 1}


def test_group_at_five_can_miss():
    training = np.concatenate([ring([0] * 5), ring([180])])
    groups = ["warm"] * 5 + ["cold"]
    shares = caption_retrieval(ring([10]), training, NAMES[:6], groups, ["p5"], ["cold"])
    assert shares == {"r@1": 0, "r@5": 0, "group": 0, "group@5": 0}


def test_equally_near_pictures_keep_the_training_order():
    training = ring([0, 0, 90])
    shares = caption_retrieval(ring([0]), training, list("abc"), list("xyz"), ["b"], ["y"])
    assert (shares["r@1"], shares["r@5"]) == (0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": NAMES[:7]}, "8 features, 7 names and 8 groups"),
        ({"prompt_groups": ["warm"]}, "2 generated pictures, 2 prompt names and 1 prompt groups"),
        ({"prompt_names": ["p0", "unheard"]}, "unheard"),
        ({"generated": np.zeros((0, 2)), "prompt_names": [], "prompt_groups": []}, "0 generated"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {
        "generated": ring([0, 1]),
        "training": TRAINING,
        "names": NAMES,
        "groups": GROUPS,
        "prompt_names": ["p0", "p1"],
        "prompt_groups": ["warm", "warm"],
    }
    with pytest.raises(ValueError, match=message):
        caption_retrieval(**(arguments | change))
