"""Resizing against Pillow, interpolation by hand and what every kernel keeps."""

import numpy as np
import pytest
from PIL import Image

from ldm_jax.metrics.resizing import ON_DEVICE, bilinear_matrix, clean
from ldm_jax.pictures import cubic_matrix


def test_bilinear_between_centres_and_corners():
    """Of 2 pixels 4: at −¼, ¼, ¾, 1¼ between centres, and at 0, ½, 1, 1½ between corners."""
    centres = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    np.testing.assert_array_equal(bilinear_matrix(2, 4, True), centres)
    corners = [[1, 0], [0.5, 0.5], [0, 1], [0, 1]]
    np.testing.assert_array_equal(bilinear_matrix(2, 4, False), corners)
    # Not antialiased: of 8 pixels 2 are the means of two, or single pixels.
    assert np.flatnonzero(bilinear_matrix(8, 2, True)[0]).tolist() == [1, 2]
    assert np.flatnonzero(bilinear_matrix(8, 2, False)[1]).tolist() == [4]


@pytest.mark.parametrize(("before", "after"), [(5, 5), (5, 12), (12, 5), (37, 16)])
def test_weights_sum_to_one(before, after):
    matrices = [bilinear_matrix(before, after, centres) for centres in (True, False)]
    matrices += [cubic_matrix(before, after, antialias=antialias) for antialias in (True, False)]
    for matrix in matrices:
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    if before == after:
        for matrix in matrices:
            np.testing.assert_allclose(matrix, np.eye(before), atol=1e-12)


def test_clean_is_pillow_on_each_channel():
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3)).astype(np.float32)
    resized = clean(images, 40)
    assert resized.shape == (2, 40, 40, 3) and resized.min() == 0 and resized.max() == 255
    plane = Image.fromarray(images[1, ..., 2]).resize((40, 40), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resized[1, ..., 2], np.clip(np.asarray(plane), 0, 255))
    assert clean(images[:, :, :20], 20) is not None


@pytest.mark.parametrize("resize", sorted(ON_DEVICE))
def test_a_flat_picture_stays_flat(resize):
    images = np.full((1, 9, 13, 3), 77.0, np.float32)
    np.testing.assert_allclose(
        ON_DEVICE[resize](images, 20), np.full((1, 20, 20, 3), 77), rtol=1e-6
    )
