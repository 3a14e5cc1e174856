"""Draws and distances of the training objective."""

import jax
import numpy as np
import pytest

from ldm_jax.diffusion.noise import per_example
from ldm_jax.diffusion.objective import per_example_loss, uniform_timesteps


def test_timesteps_are_uniform_integers_over_the_whole_table():
    t = np.asarray(uniform_timesteps(jax.random.key(0), 20_000, 10))
    counts = np.bincount(t, minlength=10)
    assert t.min() == 0 and t.max() == 9 and len(counts) == 10
    # χ² with 9 degrees of freedom exceeds 30 once in two thousand draws.
    assert ((counts - 2000) ** 2 / 2000).sum() < 30


def test_an_example_draws_the_same_in_any_batch():
    draws = [per_example(jax.random.normal, jax.random.key(3), (n, 5)) for n in (2, 7)]
    np.testing.assert_array_equal(draws[0], draws[1][:2])


@pytest.mark.parametrize("kind, expected", [("l1", [2.0, 0.5]), ("l2", [4.0, 0.25])])
def test_loss_is_the_mean_over_each_example(kind, expected):
    output = np.stack([np.full((2, 2, 1), 3.0), np.full((2, 2, 1), 0.5)])
    target = np.stack([np.full((2, 2, 1), 1.0), np.full((2, 2, 1), 1.0)])
    np.testing.assert_allclose(per_example_loss(kind, output, target), expected)


def test_unknown_loss_lists_the_known():
    with pytest.raises(ValueError, match="loss 'l3': choose l1 or l2"):
        per_example_loss("l3", np.zeros((1, 1)), np.zeros((1, 1)))
