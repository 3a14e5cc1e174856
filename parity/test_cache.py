"""DeepCache against diffusers' UNet under the authors' rule, DDIM steps written out.

The authors' helper (horseee/DeepCache) gives back what a block returned in the last whole step,
for all blocks that lie inside of a branch. Here hooks do the same to diffusers' UNet: of the way
up, the last block inside of the branch returns its old output; what else the helper leaves out has
no effect on the result. Weights are random; predictions of x0 agree to 1e-5 of the largest.
"""

import diffusers
import numpy as np
import pytest
import torch

import ldm_jax
from ldm_jax.conditions.base import embed
from ldm_jax.conditions.requests import inputs_for, other_entries
from ldm_jax.diffusion.plan import Sampling, plan
from ldm_jax.interop import diffusers as folders
from tests.interop.systems import random_params, system

SIDE, PROMPT, STEPS = 32, "a red apple on a table", 6


class Helper:
    """Keeps the output of one module of a UNet, and gives it back in steps that are not whole."""

    def __init__(self, unet, branch):
        per_level = unet.config.layers_per_block + 1
        place = branch + 1  # the number, from the outside, of the block inside of the branch
        level, layer = divmod(place, per_level)
        self.whole, self.kept = True, None
        if level == len(unet.up_blocks):
            module = unet.mid_block
        else:
            block = unet.up_blocks[len(unet.up_blocks) - 1 - level]
            index = len(block.resnets) - 1 - layer
            if layer == 0 and level > 0:
                module = block  # with its upsampling
            else:
                module = getattr(block, "attentions", block.resnets)[index]
        module.register_forward_hook(self)

    def __call__(self, module, inputs, output):
        if not self.whole:
            return self.kept
        self.kept = output
        return None


@pytest.fixture(params=["stable-diffusion-1", "stable-diffusion-xl-base"])
def opened(request, tmp_path):
    """(our pipeline, diffusers' UNet) of a small published system."""
    config = system(request.param) | {"image_size": SIDE}
    folders.write(tmp_path, config, random_params(config))
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    return ldm_jax.load(tmp_path), theirs


@pytest.mark.parametrize("branch, interval", [(0, 2), (0, 3), (1, 3), (2, 2), (3, 3)])
def test_uniform_intervals(opened, agree, branch, interval):
    ours, theirs = opened
    model, sampling = ours.model, Sampling("ddim", cache_interval=interval, cache_branch=branch)
    noise = ours.noise(0, 1, SIDE, SIDE)
    made = []
    asked = dict(latents=noise, steps=STEPS, guidance=3.0, height=SIDE, width=SIDE)
    ours(PROMPT, "", sampler=sampling, progress=lambda _, x0: made.append(np.asarray(x0)), **asked)

    given = []
    for text in ("", PROMPT):
        entries = {"caption": [text]} | other_entries(model.embedders, None, 1, (SIDE, SIDE))
        inputs = inputs_for(model.embedders, entries, 1)
        given.append(embed(model.embedders, ours.params, inputs))
    context = torch.tensor(np.concatenate([one.context for one in given]))
    added = None
    if given[0].vector is not None:  # pooled text, then the sizes' sinusoids
        width = given[0].vector.shape[-1] - 6 * 256
        pooled = np.concatenate([one.vector[:, :width] for one in given])
        sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 2)
        added = dict(text_embeds=torch.tensor(pooled), time_ids=sizes)
    table = plan(model.diffusion, STEPS, sampling).table
    helper = Helper(theirs, branch)
    x = torch.tensor(noise.transpose(0, 3, 1, 2))
    expected = []
    for i in range(STEPS):
        helper.whole = i % interval == 0
        t, alpha, sigma = (float(v[i]) for v in table["level"])
        with torch.no_grad():
            output = theirs(
                torch.cat([x, x]), t, context, added_cond_kwargs=added, return_dict=False
            )[0]
        uncond, cond = output.chunk(2)
        x0 = (x - sigma * (uncond + 3.0 * (cond - uncond))) / alpha
        expected.append(x0.numpy().transpose(0, 2, 3, 1))
        x = float(table["x"][i]) * x + float(table["b"][i, 0]) * x0
    assert len(made) == STEPS
    agree(np.stack(made), np.stack(expected))
