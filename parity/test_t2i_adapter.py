"""T2I-Adapters against diffusers': maps, the UNet's output with them, and files for each other.

All weights are random. In float32 each map, and the UNet's output with them, agree to 5e-5 of the
norm of the reference's. There is no package of the original code: its names are those of diffusers'
published conversion, spelled out here.
"""

import re

import jax
import numpy as np
import pytest
import torch
from diffusers import T2IAdapter as TheirAdapter
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from ldm_jax.interop.diffusers import read_component
from ldm_jax.interop.hints import read_hinted
from ldm_jax.interop.t2i import write_t2i
from ldm_jax.models.build import tuples
from ldm_jax.models.t2i_adapter import T2IAdapter
from ldm_jax.models.unet import UNet

OUTPUTS, CROSS, PLAIN = 5e-5, "CrossAttnDownBlock2D", "DownBlock2D"
# As SD 1, whose last level alone has no attention, and SDXL, whose first has none.
UNETS = {
    "SD 1": dict(down_block_types=(CROSS, CROSS, PLAIN), block_out_channels=(32, 64, 64)),
    "SDXL": dict(down_block_types=(PLAIN, CROSS, CROSS), block_out_channels=(32, 64, 96)),
}
# With the autoencoder's factor 2, and sides of 8 latents.
CASES = {
    "full": ("SD 1", dict(channels=[32, 64, 64], downscale_factor=2)),
    "full, grey, one block": (
        "SD 1",
        dict(channels=[32, 64, 64], downscale_factor=2, in_channels=1, num_res_blocks=1),
    ),
    "light": (
        "SD 1",
        dict(channels=[32, 64], downscale_factor=2, num_res_blocks=4, adapter_type="light_adapter"),
    ),
    "full_xl": (
        "SDXL",
        dict(channels=[32, 64, 96, 96], downscale_factor=4, adapter_type="full_adapter_xl"),
    ),
    "full_xl, without the middle": (
        "SDXL",
        dict(channels=[32, 64, 96], downscale_factor=4, adapter_type="full_adapter_xl"),
    ),
}


def randomised(model, seed):
    draws = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        values = draws.standard_normal(parameter.shape, np.float32)
        if parameter.ndim > 1:
            values /= parameter[0].numel() ** 0.5
        else:
            values = name.endswith("weight") + 0.3 * values
        parameter.data.copy_(torch.tensor(values))
    return model.eval()


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """(their UNet, their adapter, its folder, config of the model, parameters of its UNet)."""
    name, fields = CASES[request.param]
    ups = [("CrossAttnUpBlock2D" if kind == CROSS else "UpBlock2D")
           for kind in UNETS[name]["down_block_types"][::-1]]  # fmt: skip
    size = dict(sample_size=8, layers_per_block=1, cross_attention_dim=24, attention_head_dim=4)
    unet = randomised(UNet2DConditionModel(**size, **UNETS[name], up_block_types=ups), 0)
    adapter = randomised(TheirAdapter(**dict(in_channels=3) | fields), 1)
    unet.save_pretrained(tmp_path / "unet")
    adapter.save_pretrained(tmp_path / "adapter")
    found = read_component(tmp_path / "unet")
    stage = dict(kind="kl", ch=8, ch_mult=[1, 2], num_res_blocks=1, z_channels=4, embed_dim=4)
    config = found.config | dict(autoencoder=stage)
    return unet, adapter, tmp_path / "adapter", config, found.params["unet"]


def equal(found, adapter):
    state = adapter.state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


def test_maps_and_output(case, near):
    unet, adapter, folder, config, params = case
    section, own = read_hinted(folder, config)
    assert section["kind"] == "t2i"
    draws = np.random.default_rng(2)
    x = draws.standard_normal((2, 8, 8, 4), np.float32)
    context = draws.standard_normal((2, 5, 24), np.float32)
    t, channels = np.array([20, 731]), adapter.config.in_channels
    hint = draws.uniform(size=(2, 16, 16, channels)).astype(np.float32)

    @jax.jit
    def ours(hint):
        module = T2IAdapter(**tuples(section["network"]))
        features, inner = module.apply({"params": own}, hint), UNet(**tuples(config["unet"]))
        return *features, inner.apply({"params": params}, x, t, context, features=features)

    def theirs(hint):
        with torch.no_grad():
            maps = adapter(torch.tensor(hint).movedim(-1, 1))
            output = unet(
                torch.tensor(x).movedim(-1, 1),
                torch.tensor(t),
                torch.tensor(context),
                down_intrablock_additional_residuals=[one.clone() for one in maps],
            ).sample
        return [tensor.movedim(1, -1).numpy() for tensor in (*maps, output)]

    found, expected = ours(hint), theirs(hint)
    assert len(found) == len(expected)
    near("outputs", dict(enumerate(map(np.asarray, found))), dict(enumerate(expected)), OUTPUTS)
    other = theirs(1.0 - hint)[-1]
    effect = np.linalg.norm(other - expected[-1]) / np.linalg.norm(expected[-1])
    assert effect > 100 * OUTPUTS


def test_folder_that_we_write(case, tmp_path):
    """diffusers opens it, and it is the adapter that it was."""
    _, adapter, folder, config, _ = case
    section, params = read_hinted(folder, config)
    write_t2i(tmp_path / "written", section["network"], params, "diffusers")
    again = TheirAdapter.from_pretrained(tmp_path / "written")
    equal(again.state_dict(), adapter)
    kept = [{k: v for k, v in a.config.items() if k[0] != "_"} for a in (again, adapter)]
    assert kept[0] == kept[1]


def test_original_layout(case, tmp_path):
    """Names as diffusers' conversion of the originals reads them, alone and pickled by torch."""
    _, adapter, folder, config, _ = case
    section, params = read_hinted(folder, config)
    path = tmp_path / "a.safetensors"
    write_t2i(path, section["network"], params, "compvis")
    blocks, light = adapter.config.num_res_blocks, "light" in adapter.config.adapter_type

    def renamed(name):
        if light:
            return "adapter." + re.sub(r"^(body\.\d+)\.body\.", r"\1.resnets.", name)
        if not (match := re.match(r"body\.(\d+)\.(block.*|in_conv.*)", name)):
            return f"adapter.{name}"
        level, place = divmod(int(match[1]), blocks)
        inner = f"resnets.{place}." if match[2].startswith("block") else ""
        assert inner or not place
        return f"adapter.body.{level}.{inner}{match[2]}"

    equal({renamed(name): tensor for name, tensor in load_file(path).items()}, adapter)
    torch.save(load_file(path), tmp_path / "t2iadapter_canny_sd14v1.pth")
    save_file(adapter.state_dict(), tmp_path / "weights.safetensors")
    for name in ("a.safetensors", "t2iadapter_canny_sd14v1.pth", "weights.safetensors"):
        found = read_hinted(tmp_path / name, config)
        assert found[0] == section
        jax.tree.map(np.testing.assert_array_equal, found[1], params)
