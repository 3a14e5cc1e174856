"""LPIPS against the `lpips` package, with random weights for VGG16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.lpips import CONVOLUTIONS_PER_STAGE, lpips
from scripts.write_goldens import uniform
from tests.models.torch_layout import LPIPS


def parameters(widths=(64, 128, 256, 512, 512)):
    params, before = {}, 3
    for stage, (width, convolutions) in enumerate(zip(widths, CONVOLUTIONS_PER_STAGE, strict=True)):
        for i in range(1, convolutions + 1):
            params[f"conv{stage + 1}_{i}/kernel"] = jnp.zeros((3, 3, before, width))
            params[f"conv{stage + 1}_{i}/bias"] = jnp.zeros(width)
            before = width
        params[f"lin{stage}"] = jnp.ones(width)
    return params


@jax.jit
def distance_and_gradients(params, x, y):
    """Of pictures (2, 16, 16, 3)."""
    return jax.value_and_grad(lambda x, y: lpips(params, x, y).sum(), argnums=(0, 1))(x, y)


def test_agrees_with_original(agrees):
    agrees(
        "lpips",
        LPIPS,
        init=lambda x, y: parameters(),
        apply=lambda params, x, y: {"distance": lpips(params, x, y)},
        tolerance=1e-5,
    )


@pytest.mark.parametrize("bias", [0.0, -1.0])
def test_gradient_is_finite_where_all_features_are_zero(bias):
    """The originals' root of Σf² has no derivative there (PerceptualSimilarity issue 69)."""
    params = parameters(widths=(4,) * 5)
    params = {key: leaf + (bias if key.endswith("bias") else 0.0) for key, leaf in params.items()}
    x, y = uniform("x", (2, 16, 16, 3)), uniform("y", (2, 16, 16, 3))
    value, gradients = distance_and_gradients(params, x, y)
    assert value == 0 and all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_of_a_picture_and_itself():
    params = {key: uniform(key, leaf.shape) for key, leaf in parameters((4,) * 5).items()}
    x, y = uniform("x", (2, 16, 16, 3)), uniform("y", (2, 16, 16, 3))
    value, gradients = distance_and_gradients(params, x, x)
    assert value == 0 and not any(np.any(gradient) for gradient in gradients)
    value, gradients = distance_and_gradients(params, x, y)
    assert value != 0 and all(np.any(gradient) for gradient in gradients)
