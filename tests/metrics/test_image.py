"""PSNR against its closed form, SSIM against closed forms and scikit-image."""

import numpy as np
import pytest

from ldm_jax.metrics.image import SCALES, ms_ssim, psnr, scales_of, ssim


def test_psnr_of_known_errors():
    x = np.zeros((3, 4, 5, 3), np.float32)
    y = np.stack([np.full(x.shape[1:], level, np.float32) for level in (0.1, 0.01, 0.0)])
    np.testing.assert_allclose(psnr(x, y), [20, 40, np.inf], rtol=1e-5)
    np.testing.assert_allclose(psnr(2 * x, 2 * y, max_value=2)[:2], [20, 40], rtol=1e-5)
    np.testing.assert_allclose(psnr(x, y, max_value=2)[:1], 20 + 20 * np.log10(2), rtol=1e-5)


def test_ssim_of_equal_images_is_one(pictures):
    images = pictures(24)
    np.testing.assert_allclose(ssim(images, images), [1, 1], atol=1e-6)


def test_ssim_of_constant_images_is_the_luminance_term():
    x, y = np.full((1, 16, 16, 1), 0.2, np.float32), np.full((1, 16, 16, 1), 0.7, np.float32)
    expected = (2 * 0.2 * 0.7 + 1e-4) / (0.2**2 + 0.7**2 + 1e-4)
    np.testing.assert_allclose(ssim(x, y), [expected], rtol=1e-4)


def test_ssim_agrees_with_scikit_image(pictures, goldens):
    clean, noisy = pictures(48)[:, None]
    # The same formula in float64 agrees to 1e-14; in float32 the variances cancel.
    np.testing.assert_allclose(ssim(clean, noisy), [goldens["ssim_48"]], rtol=1e-5)


def test_ssim_is_per_image_and_per_channel(pictures):
    clean, noisy = pictures(32)
    both = ssim(np.stack([clean, noisy]), np.stack([noisy, noisy]))
    channels = [ssim(clean[None, ..., c : c + 1], noisy[None, ..., c : c + 1]) for c in range(3)]
    np.testing.assert_allclose(both, [np.mean(channels), 1], rtol=1e-5)


def test_ms_ssim_of_constant_images_is_the_luminance_of_the_last_scale():
    x, y = np.full((1, 48, 48, 1), 0.2, np.float32), np.full((1, 48, 48, 1), 0.7, np.float32)
    luminance = (2 * 0.2 * 0.7 + 1e-4) / (0.2**2 + 0.7**2 + 1e-4)
    power = SCALES[2] / sum(SCALES[:3])
    np.testing.assert_allclose(ms_ssim(x, y), [luminance**power], rtol=1e-4)


def test_ms_ssim_has_as_many_scales_as_fit(pictures):
    assert [scales_of((1, side, 300, 3)) for side in (11, 21, 22, 64, 175, 176, 999)] == [
        1, 1, 2, 3, 4, 5, 5,
    ]  # fmt: skip
    clean, noisy = pictures(24)[:, None, :16]
    channels = [ssim(clean[..., c : c + 1], noisy[..., c : c + 1]) for c in range(3)]
    np.testing.assert_allclose(ms_ssim(clean, noisy), np.mean(channels, axis=0), rtol=1e-5)
    np.testing.assert_allclose(ms_ssim(clean, clean), [1.0], atol=1e-6)


def test_ms_ssim_of_two_scales_is_the_product_of_its_parts(pictures):
    """Noise that 2×2 means remove is seen by the first scale alone."""
    clean = np.repeat(np.repeat(pictures(24)[:1], 2, axis=1), 2, axis=2)[:, :40, :40]
    checks = 0.05 * (-1.0) ** np.add.outer(np.arange(40), np.arange(40))[None, ..., None]
    value = float(ms_ssim(clean, clean + checks)[0])
    share = SCALES[0] / sum(SCALES[:2])
    # The mean luminance of the first scale is unchanged, so SSIM there is its structure alone.
    whole = float(ssim(clean, clean + checks)[0])
    assert value == pytest.approx(whole**share, rel=2e-2) and value > whole


@pytest.mark.parametrize("metric", [psnr, ssim, ms_ssim])
def test_shapes_must_agree(metric):
    with pytest.raises(ValueError, match=r"\(1, 16, 16, 3\) and \(1, 16, 16, 1\)"):
        metric(np.zeros((1, 16, 16, 3)), np.zeros((1, 16, 16, 1)))


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="11x11"):
        ssim(np.zeros((1, 10, 16, 3)), np.zeros((1, 10, 16, 3)))
