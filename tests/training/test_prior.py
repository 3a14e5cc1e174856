"""Prior preservation: a model trains on its own pictures as well, drawn once."""

import functools

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax.data.folder import FolderSource
from ldm_jax.interop.native import save_model
from ldm_jax.pipeline import Pipeline
from ldm_jax.training.tasks import make_task
from tests import tiny_models
from tests.conftest import ROOT
from tests.models.published import config_file
from tests.training.variants import photographs

MODEL = tiny_models.config(
    tiny_models.STABLE["conditioning"],
    channel_mult=[1],
    attention_resolutions=[1],
    context_dim=16,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "base.safetensors"
    save_model(path, MODEL, tiny_models.random_params(MODEL))
    return path


def lora(base, **prior):
    config = config_file(ROOT / "configs" / "lora.py").get_config("smoke")
    config.init_from, config.adapters.rank = str(base), 2
    config.data.update(source="emoji", image_size=16, classes=("food & drink",))
    config.data.scenes, config.latents = {}, "step"
    config.sampling.steps = 1
    config.prior.update(dict(prompt="a fruit", count=10) | prior)
    return config


def test_half_of_the_examples_are_the_models_own(base, tmp_path, monkeypatch):
    index = tmp_path / "pictures.json"
    task = make_task(lora(base), index)
    captions = [task.source.describe(i)["caption"] for i in range(len(task.source))]
    assert captions.count("a fruit") == len(captions) / 2
    drawn = FolderSource(tmp_path / "prior", "all", 16)
    assert len(drawn) == 10
    config = task.resolved | {"image_size": 16}
    pipe = Pipeline(task.model, jax.device_put(task.frozen), config)
    expected = pipe("a fruit", n=10, seed=0, batch=8)
    np.testing.assert_allclose(drawn[3]["image"] / 255, expected[3], atol=1 / 255)
    assert (drawn[3]["image"] != drawn[4]["image"]).any()

    # A later start draws nothing.
    monkeypatch.setattr(Pipeline, "__call__", None)
    make_task(lora(base), index)
    with pytest.raises(ValueError, match="holds 10 pictures, and prior.count=5: remove the folder"):
        make_task(lora(base, count=5), index)


def test_what_cannot_be_drawn_is_refused_in_a_sentence(base):
    with pytest.raises(ValueError, match="prior.count=0: choose 1 or more pictures"):
        make_task(lora(base, count=0))
    config = lora(base)
    config.data.update(source="folder", buckets=True, path=str(ROOT / "docs"), classes=())
    with pytest.raises(ValueError, match="prior.prompt gives squares: set data.buckets to False"):
        make_task(config)


def dreambooth(variant):
    return config_file(ROOT / "configs" / "dreambooth.py").get_config(variant)


@pytest.mark.parametrize("variant", ["sd15", "sdxl"])
def test_dreambooth_of_published_models(variant, tmp_path):
    """What trains is the UNet, or a LoRA; the data feed all conditions: a step is traced."""
    model = {"sd15": tiny_models.STABLE, "sdxl": tiny_models.XL}[variant]
    save_model(tmp_path / "base.safetensors", model, tiny_models.random_params(model))
    config = dreambooth(variant)
    config.init_from = str(tmp_path / "base.safetensors")
    config.train.batch_size = 8
    config.prior.prompt = ""  # the test above draws
    config.data.path = str(photographs(tmp_path / "pictures", count=10))
    task = make_task(config)
    params = jax.eval_shape(task.init, jax.random.key(0), task.loaded)
    trained = {"sd15": {"unet"}, "sdxl": {"text", "text_2", "unet"}}[variant]
    assert set(params) == trained and (task.adapters is None) == (variant == "sd15")
    gradients = functools.partial(task.gradients, phase=None)
    batch = next(task.batches(0))[1]
    grads, _ = jax.eval_shape(gradients, params, task.frozen, batch, jax.random.key(0))
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_dreambooth_as_a_lora_of_the_bundled_model():
    config = dreambooth("lora")
    config.prior.prompt = ""
    config.data.scenes.update(train_scenes=4, held_out_scenes=4)
    assert make_task(config).adapters.networks == ("text", "unet")


@pytest.mark.long
def test_dreambooth_keeps_its_class_in_mind(tmp_path):
    """The bundled model trains on eight pictures and on four of its own."""
    ldm_jax.train(dreambooth("smoke"), tmp_path / "run")
    assert len(list((tmp_path / "run" / "prior").glob("*.png"))) == 4
    before, after = ldm_jax.load(), ldm_jax.load(tmp_path / "run")
    same = dict(n=1, steps=2, seed=0)
    assert np.abs(before("an elephant", **same) - after("an elephant", **same)).max() > 1 / 255
    for network, kept in (("autoencoder", True), ("unet", False), ("text", False)):
        equal = jax.tree.map(np.array_equal, before.params[network], after.params[network])
        assert all(jax.tree.leaves(equal)) == kept, network
