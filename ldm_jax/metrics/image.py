"""PSNR, SSIM and MS-SSIM between two pictures.

Images are (B, H, W, C) float in [0, 1]; every function returns one float32 per image, (B,).
"""

import jax
import jax.numpy as jnp

WINDOW = 11  # pixels
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of MS-SSIM, the whole picture first


def psnr(x: jax.Array, y: jax.Array, max_value: float = 1.0) -> jax.Array:
    """Peak signal-to-noise ratio in decibels, (B,): 10 log10(max_value² / mean squared error).

    The mean is over pixels and channels of one image; equal images give infinity.
    """
    _check_shapes(x, y)
    error = jnp.mean(jnp.square(x - y), axis=(1, 2, 3))
    return 10 * jnp.log10(max_value**2 / error)


def ssim(x: jax.Array, y: jax.Array) -> jax.Array:
    """Structural similarity, (B,), 1 for equal images (Wang et al. 2004, eq. 13 and section III.C).

    Gaussian window of 11 pixels with σ = 1.5, K₁ = 0.01, K₂ = 0.03, biased variances, the mean over
    channels and over the interior: only windows that are fully inside the image count. This is
    scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, channel_axis=-1, data_range=1)`.

    Raises:
      ValueError: shapes differ, or an image is smaller than the window.
    """
    luminance, structure = _similarities(x, y)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def scales_of(shape: tuple[int, ...]) -> int:
    """The number of scales of MS-SSIM for images (B, H, W, C): as many of the five as are not
    smaller than the window; 5 from 176 pixels on, 3 of 64."""
    side = min(shape[1:3])
    return sum(side // 2**i >= WINDOW for i in range(len(SCALES)))


def ms_ssim(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multi-scale structural similarity, (B,), 1 for equal images (Wang et al. 2003, eq. 7).

    Each scale is half of the one before, by means of 2×2 pixels. All have `ssim`'s contrast and
    structure, the last one its luminance too; means over the interior, negative ones taken as 0, to
    the powers of `SCALES`; then the mean over channels. Images that are too small for five scales
    have `scales_of` them, with weights that sum to 1.

    Raises:
      ValueError: shapes differ, or an image is smaller than the window.
    """
    weights = jnp.asarray(SCALES[: scales_of(x.shape)])
    values = []
    for i in range(max(len(weights), 1)):
        if i:
            height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
            x, y = (
                jnp.mean(
                    a[:, :height, :width].reshape(len(a), height // 2, 2, width // 2, 2, -1), (2, 4)
                )
                for a in (x, y)
            )
        luminance, structure = _similarities(x, y)
        last = i == len(weights) - 1
        values.append(jnp.mean(luminance * structure if last else structure, axis=(1, 2)))
    powers = (weights / weights.sum())[:, None, None]
    return jnp.mean(jnp.prod(jax.nn.relu(jnp.stack(values)) ** powers, axis=0), axis=-1)


def _similarities(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Luminance, and contrast times structure, of every window (B, H − 10, W − 10, C)."""
    _check_shapes(x, y)
    if min(x.shape[1:3]) < WINDOW:
        raise ValueError(f"ssim needs images of at least 11x11 pixels, got shape {x.shape}")
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, (2 * covariance + c2) / (var_x + var_y + c2)


def _blur(images: jax.Array) -> jax.Array:
    """Gaussian window means, (B, H - 10, W - 10, C)."""
    window = jnp.exp(-0.5 * (jnp.arange(-5, 6) / 1.5) ** 2)
    window = window / window.sum()
    planes = jnp.moveaxis(images, -1, 1).reshape(-1, 1, *images.shape[1:3])
    for kernel in (window.reshape(1, 1, 11, 1), window.reshape(1, 1, 1, 11)):
        planes = jax.lax.conv_general_dilated(
            planes, kernel, (1, 1), "VALID", precision=jax.lax.Precision.HIGHEST
        )
    return jnp.moveaxis(planes.reshape(images.shape[0], -1, *planes.shape[2:]), 1, -1)


def _check_shapes(x: jax.Array, y: jax.Array) -> None:
    if x.ndim != 4 or x.shape != y.shape:
        raise ValueError(f"expected two equal shapes (B, H, W, C), got {x.shape} and {y.shape}")
