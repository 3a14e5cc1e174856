"""New pictures, copies and everything between."""

import numpy as np
import pytest

from ldm_jax.metrics.novelty import novelty


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return rng.standard_normal((3, 2000, 8))


def test_fresh_pictures_are_as_new_as_fresh_ones(pictures):
    drawn, fresh, training = pictures
    found = novelty(drawn, fresh, training)
    assert found["copied"] == pytest.approx(0.01, abs=0.008)
    assert found["novelty_p"] > 0.01


def test_copies_are_found(pictures):
    _, fresh, training = pictures
    copies = training[:500] + 0.01
    found = novelty(copies, fresh, training)
    assert found["copied"] == 1.0 and found["novelty_p"] < 1e-6


def test_a_tenth_of_copies_is_seen(pictures):
    drawn, fresh, training = pictures
    some = np.concatenate([training[:200], drawn[:1800]])
    found = novelty(some, fresh, training)
    assert found["copied"] == pytest.approx(0.11, abs=0.01) and found["novelty_p"] < 0.01


def test_pictures_of_another_kind_are_not_as_new_as_fresh_ones(pictures):
    drawn, fresh, training = pictures
    found = novelty(3.0 * drawn, fresh, training)
    assert found["copied"] < 0.01 and found["novelty_p"] < 1e-6
