"""Guidance, as formulas, against diffusers 0.42.1; under a sampler it is in `test_samplers.py`."""

import jax.numpy as jnp
import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg

from ldm_jax.diffusion.guidance import rescaled
from parity.problem import start


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
def test_guidance_rescale(phi, dtype, agree):
    """diffusers' `rescale_noise_cfg`."""
    plain = start(dtype)
    guided = 4.0 * plain[::-1] + 0.3 * plain**2
    expected = rescale_noise_cfg(torch.tensor(guided), torch.tensor(plain), phi)
    agree(rescaled(jnp.asarray(guided), jnp.asarray(plain), phi), expected)
