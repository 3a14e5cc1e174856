"""What conditions become: against the originals and by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.models.embedders import (
    ClassEmbedder,
    SpatialRescaler,
    concat_timestep_embedding,
    guidance_embedding,
)
from ldm_jax.models.layers import timestep_embedding
from tests.models.torch_layout import UNET


def test_class_is_a_token():
    network, labels = ClassEmbedder(n_classes=5, embed_dim=3), jnp.array([4, 0])
    y, variables = network.init_with_output(jax.random.key(0), labels)
    table = variables["params"]["embedding"]["embedding"]
    assert table.shape == (5, 3)
    np.testing.assert_array_equal(y, table[np.array([[4], [0]])])


def test_rescaler_agrees_with_torch(agrees):
    network = SpatialRescaler(n_stages=2, out_channels=3)
    agrees(
        "block_rescaler",
        UNET,
        init=lambda x: network.init(jax.random.key(0), x)["params"],
        apply=lambda params, x: {"y": network.apply({"params": params}, x)},
        tolerance=1e-5,
    )


def test_rescaler_without_mapping_has_no_parameters():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    y, variables = SpatialRescaler().init_with_output(jax.random.key(0), x)
    assert not variables
    np.testing.assert_array_equal(y[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])


def test_numbers_are_embedded_side_by_side():
    values = jnp.array([[1024.0, 7.5, 0.0], [768.0, 0.25, 512.0]])
    found = concat_timestep_embedding(values, 8)
    expected = np.hstack([timestep_embedding(column, 8) for column in values.T])
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(concat_timestep_embedding(values[:, 0], 8), found[:, :8])


def test_the_guidance_of_distilled_models():
    """Luo et al. 2023: sines first, of 1000 for each 1 of guidance above 1."""
    found = guidance_embedding(jnp.array([1.0, 1.001]), 6)
    np.testing.assert_array_equal(found[0], [0, 0, 0, 1, 1, 1])
    angles = np.array([1.0, 0.01, 0.0001])
    np.testing.assert_allclose(found[1], [*np.sin(angles), *np.cos(angles)], atol=1e-4)
    assert guidance_embedding(jnp.ones(2), 7).shape == (2, 7)
