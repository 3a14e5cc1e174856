"""Trained here, opened there: diffusers draws what we draw with the model or the LoRA."""

import diffusers
import numpy as np
import pytest
import torch

import ldm_jax
from ldm_jax.interop import compvis
from ldm_jax.interop import diffusers as folders
from ldm_jax.interop.files import open_state
from ldm_jax.training.loop import train
from tests.conftest import ROOT
from tests.interop.systems import random_params, system
from tests.models.published import config_file
from tests.training.test_finetune import finetune
from tests.training.variants import photographs

SIDE = 32


def folder(path):
    config = system("stable-diffusion-1") | {"image_size": SIDE}
    folders.write(path / "sd1", config, random_params(config))
    return path / "sd1"


def checkpoint(path):
    """What torch saves, with things beside the tensors as training scripts leave them."""
    config = system("stable-diffusion-1") | {"image_size": SIDE}
    compvis.write(path / "sd.safetensors", config, random_params(config))
    state = open_state(path / "sd.safetensors")
    tensors = {name: torch.from_numpy(np.array(state[name])) for name in state}
    torch.save({"state_dict": tensors, "global_step": 7}, path / "sd.ckpt")
    return path / "sd.ckpt"


@pytest.mark.parametrize("start", [folder, checkpoint])
def test_a_fine_tuned_model_is_opened_by_diffusers(start, agree, tmp_path):
    config = finetune(start(tmp_path), photographs(tmp_path / "photographs"))
    config.optimizer.update(warmup=0, lr=1e-3)
    train(config, tmp_path / "run")
    ours = ldm_jax.load(tmp_path / "run")
    ours.save(tmp_path / "mine", layout="diffusers")
    compare(agree, ours, opened(tmp_path / "mine"))


@pytest.mark.parametrize("layout, kind", [("kohya", "lora"), ("peft", "dora")])
def test_a_trained_lora_is_opened_by_diffusers(layout, kind, agree, tmp_path):
    """Convolutions, attention and the text encoder, at a scale that is not 1."""
    base, config = folder(tmp_path), config_file(ROOT / "configs" / "lora.py").get_config("sd15")
    # transformers 5 passes over DoRA's norms of text encoders, under the name that peft gives them.
    text = () if kind == "dora" else ("self_attn",)
    targets = (*config.adapters.targets, "/in_layers_2/", *text)
    config.adapters.update(layout=layout, kind=kind, alpha=4.0, targets=targets)
    pictures = str(photographs(tmp_path / "photographs"))
    config.data.update(path=pictures, image_size=SIDE, held_out=0.2)
    config.update(init_from=str(base))
    config.optimizer.update(warmup=0, lr=1e-2)
    config.train.update(steps=4, batch_size=8, log_every=2, preview_every=4, checkpoint_every=4)
    config.sampling.steps = 1
    train(config, tmp_path / "run")
    theirs, scale = opened(base), 1.0 if kind == "dora" else 0.7
    before = drawn(theirs, noise())
    theirs.load_lora_weights(tmp_path / "run", weight_name="lora.safetensors", adapter_name="mine")
    theirs.set_adapters("mine", scale)
    ours = ldm_jax.load(base).with_lora(tmp_path / "run", scale)
    compare(agree, ours, theirs)
    assert np.abs(drawn(theirs, noise()) - before).max() > 4 / 255


def opened(path):
    theirs = diffusers.DiffusionPipeline.from_pretrained(path, safety_checker=None)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def noise():
    return np.random.default_rng(2).standard_normal((1, SIDE // 2, SIDE // 2, 4), np.float32)


def drawn(theirs, noise):
    made = theirs("a picture", num_inference_steps=4, guidance_scale=3.0, output_type="np",
                  latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
                  height=SIDE, width=SIDE)  # fmt: skip
    return made.images


def compare(agree, ours, theirs):
    mine = ours("a picture", latents=noise(), steps=4, guidance=3.0, height=SIDE, width=SIDE)
    assert mine.std() > 0.01
    agree(mine, drawn(theirs, noise()), tolerance=1 / 255)
