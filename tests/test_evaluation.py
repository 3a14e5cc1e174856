"""The metrics of a whole model, on a handful of pictures."""

import numpy as np
import pytest

import ldm_jax
from ldm_jax.data.sources import EmojiSource
from ldm_jax.evaluation import drawn_metrics
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.metrics.reconstruction import reconstruction_quality
from ldm_jax.pipeline import Pipeline
from tests import tiny_models


class Few:
    """The first 40 training emoji."""

    def __init__(self):
        self._source = EmojiSource("train")
        self.classes = self._source.classes

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return self._source[index]


def test_metrics_of_captions():
    metrics, images = drawn_metrics(ldm_jax.load(), Few(), 5, steps=4, batch_size=4)
    assert images.shape == (5, 64, 64, 3) and images.dtype == np.uint8
    assert set(metrics) == {"r@1", "r@5", "group", "group@5", "fd", "fd_floor", "kid"}
    assert 0 <= metrics["r@1"] <= metrics["r@5"] <= 1
    assert metrics["fd"] > 0 and metrics["fd_floor"] > 0


@pytest.mark.parametrize("kind", ["LABELS", "UNCONDITIONAL"])
def test_metrics_without_captions(kind):
    config = getattr(tiny_models, kind)
    if kind == "LABELS":
        config = config | {"classes": list(Few().classes)}
    model, params = LatentDiffusion.from_config(config), tiny_models.random_params(config)
    metrics, images = drawn_metrics(
        Pipeline(model, params, config), Few(), 3, steps=2, batch_size=2
    )
    assert images.shape == (3, 16, 16, 3) and set(metrics) == {"fd", "fd_floor", "kid"}


def test_a_model_of_other_conditions_is_refused():
    config = tiny_models.INPAINTING
    model, params = LatentDiffusion.from_config(config), tiny_models.random_params(config)
    with pytest.raises(ValueError, match="and this model needs image too: .*--count=0"):
        drawn_metrics(Pipeline(model, params, config), Few(), 3)


def test_reconstruction_quality_of_known_errors():
    """Pictures darkened by 0.1 have a PSNR of 20 dB, but where 8 bits cannot be that dark."""

    class Grey(Few):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"image": np.full((64, 64, 3), 153, np.uint8)}

    quality = reconstruction_quality(lambda x: x / 255.0 - 0.1, Grey())
    # 0.6 − 0.1 = 127.5 / 255 rounds to 128, an error of 25 / 255.
    assert quality["psnr"] == pytest.approx(20 * np.log10(255 / 25), abs=1e-3)
    assert reconstruction_quality(lambda x: x / 255.0, Few())["ssim"] == pytest.approx(1.0)
