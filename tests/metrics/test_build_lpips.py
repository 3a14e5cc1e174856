"""The first convolution for LPIPS's scaled RGB does what Caffe's did on mean-subtracted BGR."""

import runpy
from pathlib import Path

import numpy as np
from scipy.signal import correlate

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_lpips.py"


def convolve(image, kernel, bias):
    """Zero-padded, (H, W, 3) to (H, W)."""
    return sum(correlate(image[..., c], kernel[..., c], "same") for c in range(3)) + bias


def test_folded_convolution():
    script = runpy.run_path(str(SCRIPT))
    random = np.random.default_rng(0)
    kernel, bias = random.normal(size=(3, 3, 3, 1)), random.normal(size=1)
    rgb = random.random((8, 9, 3))
    caffe = (255 * rgb - [122.67892, 116.66877, 104.00699])[..., ::-1]
    scaled = (2 * rgb - 1 - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]

    expected = convolve(caffe, kernel[..., 0], bias)
    folded_kernel, folded_bias = script["fold_input"](kernel, bias)
    folded = convolve(scaled, folded_kernel[..., 0], folded_bias)

    np.testing.assert_allclose(folded[1:-1, 1:-1], expected[1:-1, 1:-1], rtol=1e-9)
    border = np.abs(folded - expected).max()
    assert 0 < border < np.abs(kernel).sum()  # padding stands for a colour at most 1 of 255 away
