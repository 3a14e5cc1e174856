"""The patch discriminator against taming-transformers' in training mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.discriminator import PatchDiscriminator
from tests.models.torch_layout import discriminator, leaves


@pytest.mark.parametrize("n_layers", [2, 3, 4])
def test_agrees_with_original(n_layers, agrees):
    network = PatchDiscriminator(ndf=8, n_layers=n_layers)
    agrees(
        f"discriminator_{n_layers}",
        discriminator(n_layers),
        init=lambda x: network.init(jax.random.key(0), x)["params"],
        apply=lambda params, x: {"y": network.apply({"params": params}, x)},
        tolerance=5e-5,
    )


@pytest.mark.parametrize(
    ("n_layers", "parameters", "tensors"), [(2, 0.663361, 10), (3, 2.765633, 13)]
)
def test_original_sizes(n_layers, parameters, tensors, size):
    network = PatchDiscriminator(n_layers=n_layers)
    found = size(network, jnp.zeros((1, 64, 64, 3)))
    assert found == (pytest.approx(parameters, abs=1e-7), tensors)


def test_initial_values(fresh):
    """pix2pix's: kernels N(0, 0.02), scales N(1, 0.02), biases 0."""
    _, params = fresh(PatchDiscriminator(n_layers=2), jnp.zeros((1, 16, 16, 3)))
    for path, leaf in leaves(params).items():
        kind = path.split("/")[-1]
        if kind == "bias":
            assert not np.any(leaf)
        else:
            assert abs(np.mean(leaf) - (kind == "scale")) < 0.006
            assert abs(np.std(leaf) - 0.02) < 0.003
