"""BSRGAN's degradation: its parts by closed forms, its random numbers by their distributions."""

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import degradations
from ldm_jax.data.conditions import make_conditions
from ldm_jax.data.degradations import RECIPES, blur_kernel, degraded, gaussian_kernel, noise, resize
from ldm_jax.data.sources import EmojiSource

PICTURE = EmojiSource("train")[700]["image"]


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", ["linear", "cubic", "area", "antialiased"])
@pytest.mark.parametrize("size", [(16, 16), (24, 9), (64, 64), (96, 70)])
def test_resizing_keeps_constants_and_the_same_size(kind, size):
    np.testing.assert_allclose(resize(np.full((64, 64, 3), 0.3), size, kind), 0.3, atol=1e-12)
    x = rng().random((64, 64, 3))
    np.testing.assert_allclose(resize(x, (64, 64), kind), x, atol=1e-12)


def test_area_is_the_mean_of_whole_pixels():
    x = rng().random((64, 64, 3))
    means = x.reshape(16, 4, 16, 4, 3).mean((1, 3))
    np.testing.assert_allclose(resize(x, (16, 16), "area"), means, atol=1e-12)


def test_linear_by_four_is_the_mean_of_the_two_pixels_in_the_middle():
    x = rng().random((64, 1, 1))
    middle = x.reshape(16, 4)[:, 1:3].mean(1)
    np.testing.assert_allclose(resize(x, (16, 1), "linear")[:, 0, 0], middle, atol=1e-12)


def test_antialiased_is_pillows_bicubic_away_from_the_edge():
    x = rng().random((64, 64)).astype(np.float32)
    pillow = np.asarray(Image.fromarray(x).resize((16, 16), Image.Resampling.BICUBIC))
    ours = resize(x[..., None], (16, 16), "antialiased")[..., 0]
    np.testing.assert_allclose(ours[2:-2, 2:-2], pillow[2:-2, 2:-2], atol=1e-5)


def test_a_kernel_has_the_covariance_that_was_asked():
    covariance = np.array([[3.0, 1.0], [1.0, 2.0]])
    kernel = gaussian_kernel(25, covariance)
    at = np.arange(25) - 12.0
    places = np.stack(np.meshgrid(at, at), -1)
    found = np.einsum("yx,yxi,yxj->ij", kernel, places, places)
    np.testing.assert_allclose(found, covariance, rtol=1e-3)
    assert kernel.sum() == pytest.approx(1.0)
    assert gaussian_kernel(7, np.zeros((2, 2)))[3, 3] == pytest.approx(1.0)


@pytest.mark.parametrize("name, sizes", [("bsrgan", (7, 25)), ("bsrgan_light", (5, 14))])
def test_kernels_have_the_sizes_of_the_recipe(name, sizes):
    draws = [blur_kernel(4, RECIPES[name], rng(i)).shape[0] for i in range(300)]
    assert (min(draws), max(draws)) == sizes


@pytest.mark.parametrize("name", RECIPES)
def test_noise_is_as_strong_as_the_recipe_says(name):
    """A third each: by channel, grey, and of channels that vary together."""
    low, high = RECIPES[name].noise
    drawn = [noise((32, 32, 3), RECIPES[name], rng(i)) for i in range(200)]
    grey = np.mean([part.shape[-1] == 1 for part in drawn])
    assert 0.3 < grey < 0.5
    stds = np.array([part.std() * 255.0 for part in drawn])
    assert stds.max() < 1.15 * high and np.mean(stds > 0.7 * low) > 0.7


@pytest.mark.parametrize("name", degradations.DEGRADATIONS)
@pytest.mark.parametrize("shape", [(64, 64), (48, 64)])
def test_every_degradation_shrinks_and_stays_near_the_picture(name, shape):
    image = PICTURE[: shape[0], : shape[1]]
    small = np.asarray(degradations.shrink(image, 4), np.float64)
    for seed in range(8):
        made = degraded(image, 4, name, rng(seed))
        assert made.shape == (shape[0] // 4, shape[1] // 4, 3) and made.dtype == np.uint8
        assert np.abs(made - small).mean() < 60.0
        again = degraded(image, 4, name, rng(seed))
        np.testing.assert_array_equal(made, again)
    if name in RECIPES:
        assert (degraded(image, 4, name, rng(0)) != degraded(image, 4, name, rng(1))).any()


def test_the_light_variant_destroys_less():
    small = np.asarray(degradations.shrink(PICTURE, 4), np.float64)
    full, light = (
        np.mean([np.abs(degraded(PICTURE, 4, name, rng(i)) - small).mean() for i in range(40)])
        for name in ("bsrgan", "bsrgan_light")
    )
    assert light < 0.7 * full


def test_the_final_size_is_reached_after_the_free_shrinking():
    """Otherwise the picture would not have its final size."""
    for seed in range(60):
        assert degraded(PICTURE, 4, "bsrgan", rng(seed)).shape == (16, 16, 3)
        assert degraded(PICTURE, 2, "bsrgan", rng(seed)).shape == (32, 32, 3)


@pytest.mark.parametrize("free", [0.0, 1.0])
def test_shrinking_keeps_places(free):
    """Of a ramp, each pixel is the mean of the pixels that it stands for, but at the edges."""
    recipe = degradations.Recipe(0, 1.0, 1, (2, 4), free, (0, 0), (100, 100))
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 3, 64, axis=0).repeat(3, axis=2)
    means = ramp.astype(np.float64).reshape(32, 2, 32, 2, 3).mean((1, 3))
    made = np.mean([degradations.degrade(ramp, 2, recipe, rng(i)) for i in range(8)], axis=0)
    np.testing.assert_allclose(made[8:-8, 8:-8], means[8:-8, 8:-8], atol=1.5)


def test_an_unknown_degradation_is_named():
    with pytest.raises(ValueError, match="degradation='blur': choose one of pil_nearest, .*bsrgan"):
        make_conditions({"low_resolution": dict(degradation="blur")})
