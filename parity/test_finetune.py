"""Fine-tuned here, opened there: diffusers draws what we draw with the model that we trained."""

import diffusers
import numpy as np
import pytest
import torch

import ldm_jax
from ldm_jax.interop import compvis
from ldm_jax.interop import diffusers as folders
from ldm_jax.interop.files import open_state
from ldm_jax.training.loop import train
from tests.interop.systems import random_params, system
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

    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "mine", safety_checker=None)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    side = SIDE // ours.autoencoder.downsampling
    noise = np.random.default_rng(2).standard_normal((1, side, side, 4), np.float32)
    mine = ours("a picture", latents=noise, steps=4, guidance=3.0, height=SIDE, width=SIDE)
    made = theirs("a picture", num_inference_steps=4, guidance_scale=3.0, output_type="np",
                  latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
                  height=SIDE, width=SIDE)  # fmt: skip
    assert mine.std() > 0.01
    agree(mine, made.images, tolerance=1 / 255)
