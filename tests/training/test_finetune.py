"""Fine-tuning of imported models: which parameters are loaded, trained, frozen and exported."""

import jax
import numpy as np
import pytest
from PIL import Image

import ldm_jax
from ldm_jax.interop import compvis, diffusers
from ldm_jax.interop.opening import open_any
from ldm_jax.training.loop import train
from ldm_jax.training.tasks import make_task
from tests.conftest import ROOT
from tests.interop.systems import random_params, system
from tests.models.published import config_file
from tests.training.variants import photographs

SIZE = 32  # latents of 16, for these autoencoders halve once


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """A folder of Stable Diffusion 1, narrow and random."""
    path = tmp_path_factory.mktemp("model") / "sd1"
    config = system("stable-diffusion-1")
    diffusers.write(path, config | {"image_size": SIZE}, random_params(config))
    return path


def finetune(start, pictures, **train):
    config = config_file(ROOT / "configs" / "finetune.py").get_config()
    config.init_from = str(start)
    config.data.update(path=str(pictures), image_size=SIZE, held_out=0.2)
    config.sampling.steps = 1
    config.train.update(batch_size=8, steps=2, log_every=1, preview_every=2, checkpoint_every=2)
    config.train.update(train)
    return config


def leaves(params):
    return {jax.tree_util.keystr(p): v for p, v in jax.tree_util.tree_leaves_with_path(params)}


def test_at_step_0_the_exported_model_is_the_loaded_one(stable, pictures, tmp_path):
    train(finetune(stable, pictures, steps=0), tmp_path / "run")
    before, after = open_any(stable), open_any(tmp_path / "run")
    a, b = leaves(before.params), leaves(after.params)
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)
    for section in ("unet", "autoencoder", "conditioning", "diffusion"):
        assert after.config[section] == before.config[section]


@pytest.mark.long
def test_only_what_trains_moves_and_the_model_goes_back(stable, pictures, tmp_path):
    config = finetune(stable, pictures)
    config.optimizer.warmup = 0
    config.trainable = ("/attn2/", "^unet/out_2/")
    train(config, tmp_path / "run")
    before, after = leaves(open_any(stable).params), leaves(open_any(tmp_path / "run").params)
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert moved == {n for n in before if "'attn2'" in n or "['unet']['out_2']" in n}
    ldm_jax.load(tmp_path / "run").save(tmp_path / "mine", layout="diffusers")
    back = leaves(open_any(tmp_path / "mine").params)
    for name, value in after.items():
        np.testing.assert_array_equal(value, back[name], err_msg=name)


def test_a_mask_beside_each_picture_weighs_the_loss(stable, tmp_path):
    folder = photographs(tmp_path / "pictures", count=10)
    for i, path in enumerate(sorted(folder.rglob("*.jpg"))):
        Image.new("L", (100, 80), 255 if i % 2 else 128).save(path.with_suffix(".mask.png"))
    config = finetune(stable, folder)
    config.data.conditions = dict(loss_mask=dict(factor=2))
    task = make_task(config)
    _, batch = next(task.batches(0))
    assert batch["loss_mask"].shape == (8, 16, 16, 1)
    np.testing.assert_allclose(np.unique(batch["loss_mask"].round(4)), [0.502, 1.0])

    params = jax.jit(task.init)(jax.random.key(0), task.loaded)
    gradients = jax.jit(task.gradients, static_argnums=4)
    given, whole, quarter = (
        gradients(params, task.frozen, batch | {"loss_mask": mask}, jax.random.key(1), None)
        for mask in (batch["loss_mask"], np.ones((8, 16, 16, 1)), np.full((8, 16, 16, 1), 0.25))
    )
    assert 0.502 < float(given[1]["loss"] / whole[1]["loss"]) < 1.0
    for a, b in zip(jax.tree.leaves(quarter), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, 0.25 * b, rtol=1e-4, atol=1e-7)

    config.data.conditions.loss_mask.factor = 8
    task = make_task(config)
    _, batch = next(task.batches(0))
    with pytest.raises(ValueError, match="factor: the mask has 4×4, and the latents 16×16"):
        jax.eval_shape(lambda: task.gradients(params, task.frozen, batch, jax.random.key(1), None))


def test_a_checkpoint_holds_what_trains_and_nothing_else(stable, pictures):
    config = finetune(stable, pictures)
    config.trainable = ("/attn2/",)
    task = make_task(config)
    trained = jax.eval_shape(task.init, jax.random.key(0), task.loaded)
    assert all("'attn2'" in name for name in leaves(trained))
    assert not leaves(trained).keys() & leaves(task.frozen).keys()
    assert {"autoencoder", "text", "unet"} == task.frozen.keys()


@pytest.mark.long
def test_a_single_file_and_text_states_that_are_kept(pictures, tmp_path):
    """Kept or computed, the losses are the same."""
    config = system("stable-diffusion-1") | {"image_size": SIZE}
    compvis.write(tmp_path / "sd.safetensors", config, random_params(config))
    losses = []
    for how in ("step", "memory"):
        config = finetune(tmp_path / "sd.safetensors", pictures)
        config.text_states, config.latents = how, how
        losses.append(train(config, tmp_path / how)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.long
def test_an_inpainting_model_starts_from_a_plain_one(stable, pictures, tmp_path):
    """Nine input channels of which five are new: at step 0 it predicts what the plain one does."""
    config = finetune(stable, pictures, steps=0)
    inpainting = system("stable-diffusion-1-inpainting")
    for section in ("unet", "conditioning"):
        config[section] = inpainting[section]
    config.data.conditions = {"mask": dict(recipe="sd512_large", whole=0.25)}
    train(config, tmp_path / "run")
    kernel = open_any(tmp_path / "run").params["unet"]["input_blocks_0_0"]["kernel"]
    assert kernel.shape[2] == 9 and not kernel[:, :, 4:].any()
    plain = open_any(stable).params["unet"]["input_blocks_0_0"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :, :4], plain)


BAD = {
    "nothing to start from": (
        lambda c: c.update(init_from=""), "unet is empty: name a model to start from, init_from="),
    "frozen random numbers": (
        lambda c: c.update(init_networks=("unet",)),
        "trainable leaves text frozen at random numbers"),
    "no such parameter": (
        lambda c: c.update(trainable=("lora",)), "no parameter matches 'lora'; paths look like"),
    "another shape": (
        lambda c: c.update(unet=system("stable-diffusion-1")["unet"] | dict(model_channels=32)),
        "is of another shape: unet/"),
    "a condition without data": (
        lambda c: c.update(conditioning=system("stable-diffusion-1-inpainting")["conditioning"]),
        "conditioning.masked_image needs the entry 'mask'"),
    "another autoencoder": (
        lambda c: c.update(first_stage=str(ROOT / "ldm_jax/weights/bundled.safetensors")),
        r"has latents of 16 channels at 1/8 of the size, and unet.out_channels is 4"),
    "latents": (lambda c: c.update(latents="disk"), "latents='disk': choose one of memory, step"),
    "text states": (
        lambda c: c.update(text_states="disk"), "text_states='disk': choose one of step, memory"),
    "moving pictures that are encoded once": (
        lambda c: (c.update(latents="memory"), c.data.update(augment=("flip",))),
        "flip would change the pictures, but latents='memory' encodes each once"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_train_is_refused_in_a_sentence(what, stable, pictures):
    change, message = BAD[what]
    config = finetune(stable, pictures)
    change(config)
    with pytest.raises(ValueError, match=message):
        make_task(config)
