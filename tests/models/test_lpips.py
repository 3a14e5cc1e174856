"""LPIPS against the `lpips` package, with random weights for VGG16."""

import jax
import jax.numpy as jnp
import numpy as np

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


def test_agrees_with_original(agrees):
    agrees(
        "lpips",
        LPIPS,
        init=lambda x, y: parameters(),
        apply=lambda params, x, y: {"distance": lpips(params, x, y)},
        tolerance=1e-5,
    )


def test_compares_directions(monkeypatch):
    """With features (3, 4, 0) and (0, 0, 2): ‖(0.6, 0.8, 0) − (0, 0, 1)‖² = 2. Both zero: 0."""
    monkeypatch.setattr("ldm_jax.models.lpips.vgg_features", lambda params, x: [x])
    x = jnp.array([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]).reshape(1, 1, 2, 3)
    y = jnp.array([[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]]).reshape(1, 1, 2, 3)

    def distance(x, y):
        return lpips({"lin0": jnp.ones(3)}, x, y)[0]

    value, gradients = jax.value_and_grad(distance, argnums=(0, 1))(x, y)
    np.testing.assert_allclose(value, (2 + 0) / 2, rtol=1e-6)
    # The originals' root has no derivative at zero (PerceptualSimilarity issues 69 and 121).
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)
    np.testing.assert_allclose(gradients[1][0, 0, 0], [-0.3, -0.4, 0], atol=1e-6)


def test_of_a_picture_and_itself():
    params = {key: uniform(key, leaf.shape) for key, leaf in parameters((4,) * 5).items()}
    x = uniform("x", (2, 16, 16, 3))
    value, gradient = jax.jit(jax.value_and_grad(lambda y: lpips(params, x, y).sum()))(x)
    assert abs(value) < 1e-12 and np.max(np.abs(gradient)) < 1e-6
