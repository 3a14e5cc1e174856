"""Training on a source without end: nothing reads all of it."""

import logging
from functools import partial

import pytest

from configs import autoencoder, txt2img
from ldm_jax.data.sources import sample
from ldm_jax.training import autoencoder_task
from ldm_jax.training.loop import train
from ldm_jax.training.tasks import make_task


@pytest.fixture
def config():
    config = txt2img.get_config("smoke")
    config.data.update(source="scenes", classes=())
    config.data.scenes.held_out_scenes = 8
    config.latents = "step"
    config.conditioning.text.vocabulary = "scenes"
    config.conditioning.text.network.max_length = 32
    return config


def test_the_summary_looks_at_the_first_scenes(config, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(config, tmp_path, dry_run=True)
    (line,) = [r.message for r in caplog.records if r.message.startswith("Data: ")]
    assert line == "Data: 10,000,000 pictures, of which the first 10,000 are looked at"
    assert (tmp_path / "first_batch.png").is_file()


@pytest.mark.long
def test_a_model_of_scenes_trains(config, tmp_path):
    config.train.update(steps=2, log_every=1, checkpoint_every=2, preview_every=2)
    assert train(config, tmp_path)["loss"] > 0


@pytest.mark.parametrize("kept", ["latents", "text_states"])
def test_ten_million_pictures_are_not_kept_in_memory(kept, config):
    config[kept] = "memory"
    message = (
        f"{kept}='memory' keeps at most 2,000,000 pictures, and .*'scenes' has 10,000,000: use"
    )
    with pytest.raises(ValueError, match=message):
        make_task(config)


def test_few_scenes_can_be_kept_in_memory(config):
    config.latents = "memory"
    config.data.scenes.update(train_scenes=5, held_out_scenes=5)
    assert make_task(config).source.moments.shape == (5, 8, 8, 32)


@pytest.mark.long
def test_an_autoencoder_of_scenes_measures_its_latents_on_some(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(autoencoder_task, "sample", partial(sample, count=16))
    config = autoencoder.get_config("smoke")
    config.data.update(source="scenes", classes=())
    config.data.scenes.held_out_scenes = 8
    config.train.update(steps=1, log_every=1, checkpoint_every=1, preview_every=1)
    with caplog.at_level(logging.INFO):
        train(config, tmp_path)
    assert f"over {16 * 8 * 8 * 16} latents" in caplog.text
