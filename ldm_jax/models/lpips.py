"""Learned perceptual distance (Zhang et al. 2018, eq. 1) on features of VGG-16 or AlexNet.

The weights are a file of the user; `scripts/build_lpips.py` makes one of VGG-16, and
`ldm_jax.metrics.lpips` reads others. Parameters: a flat dict `conv{stage}_{i}/kernel` (HWIO) and
`conv{stage}_{i}/bias` of VGG-16, or `alex{1..5}/kernel` and `alex{1..5}/bias`; and `lin{0..4}`,
(C,).
"""

import jax
import jax.numpy as jnp

CONVOLUTIONS_PER_STAGE = (2, 2, 3, 3, 3)
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


def vgg_features(params: dict[str, jax.Array], x: jax.Array) -> list[jax.Array]:
    """Activations after relu1_2, 2_2, 3_3, 4_3 and 5_3 for images (B, H, W, 3) in [−1, 1]."""
    h = (x - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
    features = []
    for stage, convolutions in enumerate(CONVOLUTIONS_PER_STAGE, start=1):
        if stage > 1:
            h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for i in range(1, convolutions + 1):
            kernel, bias = params[f"conv{stage}_{i}/kernel"], params[f"conv{stage}_{i}/bias"]
            layout = ("NHWC", "HWIO", "NHWC")
            h = jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=layout)
            h = jax.nn.relu(h + bias)
        features.append(h)
    return features


def alex_features(params: dict[str, jax.Array], x: jax.Array) -> list[jax.Array]:
    """Activations after each of AlexNet's five convolutions for images (B, H, W, 3) in [−1, 1]."""
    h = (x - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
    features = []
    for i, (stride, pad) in enumerate(((4, 2), (1, 2), (1, 1), (1, 1), (1, 1)), start=1):
        if i in (2, 3):
            h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        layout, padding = ("NHWC", "HWIO", "NHWC"), ((pad, pad), (pad, pad))
        h = jax.lax.conv_general_dilated(
            h, params[f"alex{i}/kernel"], (stride, stride), padding, dimension_numbers=layout
        )
        h = jax.nn.relu(h + params[f"alex{i}/bias"])
        features.append(h)
    return features


def lpips(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Perceptual distance per image, (B,), of images (B, H, W, 3) in [−1, 1]; at least 16×16, or
    31×31 with AlexNet.

    The originals normalise by √Σf² + 1e-10, whose gradient is NaN where all channels are zero; here
    the epsilon is inside the root, which changes the value by less than 1e-6.
    """

    def unit(f):
        return f / (jnp.sqrt(jnp.sum(jnp.square(f), axis=-1, keepdims=True) + 1e-20) + 1e-10)

    network = alex_features if "alex1/kernel" in params else vgg_features
    both = network(params, jnp.concatenate([x, y]))
    distance = 0.0
    for layer, features in enumerate(both):
        fx, fy = jnp.split(unit(features), 2)
        weighted = jnp.square(fx - fy) @ params[f"lin{layer}"]
        distance += jnp.mean(weighted, axis=(1, 2))
    return distance
