"""The metrics of a whole model, on a handful of pictures."""

import numpy as np
import pytest

import ldm_jax
from ldm_jax.data.sources import EmojiSource
from ldm_jax.evaluation import text_to_image
from ldm_jax.metrics.reconstruction import reconstruction_quality


class Few:
    """The first 40 training emoji."""

    def __init__(self):
        self._source = EmojiSource("train")
        self.classes = self._source.classes

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return self._source[index]


def test_text_to_image_metrics():
    metrics, images = text_to_image(ldm_jax.load(), Few(), 5, steps=4, batch_size=4)
    assert images.shape == (5, 64, 64, 3) and images.dtype == np.uint8
    assert set(metrics) == {"r@1", "r@5", "group", "group@5", "fd", "fd_floor", "kid"}
    assert 0 <= metrics["r@1"] <= metrics["r@5"] <= 1
    assert metrics["fd"] > 0 and metrics["fd_floor"] > 0


def test_reconstruction_quality_of_known_errors():
    """Pictures darkened by 0.1 have a PSNR of 20 dB, but where 8 bits cannot be that dark."""

    class Grey(Few):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"image": np.full((64, 64, 3), 153, np.uint8)}

    quality = reconstruction_quality(lambda x: x / 255.0 - 0.1, Grey())
    # 0.6 − 0.1 = 127.5 / 255 rounds to 128, an error of 25 / 255.
    assert quality["psnr"] == pytest.approx(20 * np.log10(255 / 25), abs=1e-3)
    assert reconstruction_quality(lambda x: x / 255.0, Few())["ssim"] == pytest.approx(1.0)
