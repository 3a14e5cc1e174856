"""A batch of pictures on all devices of a machine."""

import numpy as np
import pytest

from ldm_jax import pipeline
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pipeline import Pipeline
from tests import tiny_models

PROMPTS = [f"picture {i}" for i in range(8)]


@pytest.fixture(scope="module")
def pipe():
    config = tiny_models.STABLE
    return Pipeline(LatentDiffusion.from_config(config), tiny_models.random_params(config), config)


def test_a_batch_that_divides_is_drawn_by_all_devices(pipe, monkeypatch):
    devices, to_host = [], pipeline.to_host

    def look(images):
        devices.append(len({shard.device for shard in images.addressable_shards}))
        return to_host(images)

    monkeypatch.setattr(pipeline, "to_host", look)
    options = dict(negative_prompt="blue", steps=2, height=64, width=64, seed=3)
    reports = []
    shared = pipe(PROMPTS, progress=lambda done, x0: reports.append(len(x0)), **options)
    assert devices == [8] and reports == [8, 8], "a callback gets all pictures at once"
    alone = pipe(PROMPTS, batch=4, **options)
    assert devices == [8, 1, 1]
    np.testing.assert_allclose(shared, alone, atol=2e-4)
