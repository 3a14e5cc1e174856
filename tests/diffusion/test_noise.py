"""Random numbers of examples, and the seeds that they start from."""

import jax
import numpy as np
import pytest

from ldm_jax.diffusion.noise import seed_bits


@pytest.mark.parametrize(
    "seed", [0, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3, -1, -(2**40)]
)
def test_a_program_has_the_key_of_its_seed(seed):
    key, own = jax.random.key(seed), jax.jit(jax.random.key)(seed_bits(seed))
    np.testing.assert_array_equal(jax.random.key_data(own), jax.random.key_data(key))
