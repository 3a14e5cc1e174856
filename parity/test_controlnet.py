"""ControlNets against diffusers': what both compute, and files that each writes for the other.

All weights are random, the convolutions that start at zero included. In float32, relative to the
norm of the reference's, each residual and the UNet's output with them agree to 5e-5.
"""

import inspect
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    SparseControlNetModel,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.torch import load_file, save_file

from ldm_jax.interop.control import read_control, write_control
from ldm_jax.interop.diffusers import read_component
from ldm_jax.models.build import tuples
from ldm_jax.models.controlnet import ControlNet
from ldm_jax.models.embedders import concat_timestep_embedding
from ldm_jax.models.unet import UNet

OUTPUTS, CROSS, PLAIN = 5e-5, "CrossAttnDownBlock2D", "DownBlock2D"
SD2 = dict(attention_head_dim=(2, 4), use_linear_projection=True)
SDXL = SD2 | dict(
    block_out_channels=(64, 128, 128),
    down_block_types=(PLAIN, CROSS, CROSS),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(2, 4, 4),
    transformer_layers_per_block=(1, 2, 3),
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=20 + 6 * 8,
)
LESS = dict(transformer_layers_per_block=(1, 0, 1))
# Of the UNet, and of the ControlNet besides: `config` has other values of the UNet's keys.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SD 1": (dict(attention_head_dim=8), {}),
    "SD 1 inpainting": (dict(in_channels=9), dict(config=dict(in_channels=4))),
    "SD 2": (SD2 | dict(layers_per_block=2), {}),
    "SD 2, half the size, BGR": (
        SD2,
        dict(
            conditioning_embedding_out_channels=(8, 12),
            controlnet_conditioning_channel_order="bgr",
        ),
    ),
    "SDXL": (SDXL, {}),
    "SDXL, less attention": (SDXL, dict(config=LESS)),
}


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    draws = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        values = draws.standard_normal(parameter.shape, np.float32)
        if parameter.ndim > 1:
            values *= (2.0 if "cond_embedding" in name else 1.0) / parameter[0].numel() ** 0.5
        else:
            values = name.endswith("weight") + 0.3 * values
        parameter.data.copy_(torch.tensor(values))
    return model.eval()


def models(case: str) -> tuple[UNet2DConditionModel, ControlNetModel]:
    size = dict(sample_size=8, block_out_channels=(64, 128), layers_per_block=1)
    size |= dict(
        down_block_types=(CROSS, PLAIN), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
    )
    fields, options = CASES[case]
    unet = UNet2DConditionModel(**size | dict(cross_attention_dim=24) | fields)
    own = dict(options)
    changed = own.pop("config", {})
    control = ControlNetModel.from_unet(unet, load_weights_from_unet=False, **own)
    if changed:
        known = inspect.signature(ControlNetModel).parameters
        kept = {key: value for key, value in control.config.items() if key in known}
        control = ControlNetModel(**kept | changed)
    return randomised(unet, 0), randomised(control, 1)


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """(UNet, ControlNet, its folder, config of the model, parameters of its UNet)."""
    unet, control = models(request.param)
    unet.save_pretrained(tmp_path / "unet")
    control.save_pretrained(tmp_path / "control")
    found = read_component(tmp_path / "unet")
    return unet, control, tmp_path / "control", found.config, found.params["unet"]


def inputs(unet, control):
    draws, xl = np.random.default_rng(2), unet.config.addition_embed_type
    factor = 2 ** (len(control.config.conditioning_embedding_out_channels) - 1)
    return dict(
        x=draws.standard_normal((2, 8, 8, unet.config.in_channels), np.float32),
        t=np.array([20, 731]),
        context=draws.standard_normal((2, 5, 24), np.float32),
        hint=draws.uniform(size=(2, 8 * factor, 8 * factor, 3)).astype(np.float32),
        text_embeds=draws.standard_normal((2, 20), np.float32) if xl else None,
        time_ids=100.0 * np.arange(12, dtype=np.float32).reshape(2, 6) if xl else None,
    )


def theirs(unet, control, x, t, context, hint, text_embeds, time_ids):
    """(residuals, output), of torch."""
    x, hint = (torch.tensor(array).movedim(-1, 1) for array in (x, hint))
    t, context = torch.tensor(t), torch.tensor(context)
    added = dict(text_embeds=text_embeds, time_ids=time_ids)
    added = {key: torch.tensor(v) for key, v in added.items() if v is not None}
    with torch.no_grad():
        latents = x[:, : control.config.in_channels]
        residuals, middle = control(
            latents, t, context, hint, added_cond_kwargs=added, return_dict=False
        )
        output = unet(
            x,
            t,
            context,
            added_cond_kwargs=added,
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=middle,
        ).sample
    return [tensor.movedim(1, -1).numpy() for tensor in (*residuals, middle, output)]


def ours(fields, params, section, control, x, t, context, hint, text_embeds, time_ids):
    y = None
    if text_embeds is not None:
        y = jnp.hstack([text_embeds, concat_timestep_embedding(time_ids, 8)])
    section = dict(section)
    inner, bgr = UNet(**tuples(section.pop("unet"))), section["bgr"]
    module = ControlNet(inner, **tuples(section))
    hint = hint[..., ::-1] if bgr else hint

    @jax.jit
    def run(params, control):
        latents = x[..., : inner.in_channels]
        residuals = module.apply({"params": control}, latents, t, context, y=y, hint=hint)
        unet = UNet(**tuples(fields))
        return *residuals, unet.apply({"params": params}, x, t, context, y=y, residuals=residuals)

    return list(map(np.asarray, run(params, control)))


def test_outputs(case, near):
    """Of a folder that diffusers wrote: every residual, and the UNet's output with them."""
    unet, control, folder, config, params = case
    section, read = read_control(folder, config)
    given = inputs(unet, control)
    found = ours(config["unet"], params, section, read, **given)
    expected = theirs(unet, control, **given)
    assert len(found) == len(expected)
    near("outputs", dict(enumerate(found)), dict(enumerate(expected)), OUTPUTS)
    other = theirs(unet, control, **given | dict(hint=1.0 - given["hint"]))[-1]
    effect = np.linalg.norm(other - expected[-1]) / np.linalg.norm(expected[-1])
    assert effect > 100 * OUTPUTS


def equal(found: dict[str, torch.Tensor], control: ControlNetModel, without: str = "none"):
    state = {k: v for k, v in control.state_dict().items() if not k.startswith(without)}
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


def test_folder_that_we_write(case, tmp_path):
    """diffusers opens it, and it is the ControlNet that it was, in values and in its JSON."""
    _, control, folder, config, _ = case
    write_control(tmp_path / "written", *read_control(folder, config), "diffusers")
    again = ControlNetModel.from_pretrained(tmp_path / "written")
    equal(again.state_dict(), control)
    content = json.loads((tmp_path / "written" / "config.json").read_text())
    keys = {key for key in content if not key.startswith("_")}
    assert keys <= inspect.signature(ControlNetModel).parameters.keys()
    # SDXL's numbers are written with their usual embedding; heads and depth, by level or for all.
    loose = ("addition_time_embed_dim", "transformer_layers_per_block", "attention_head_dim")
    heads = [
        [block.num_attention_heads for block in attending(model)] for model in (again, control)
    ]
    assert heads[0] == heads[1]
    for key in keys - set(loose):
        value, expected = again.config[key], control.config[key]
        assert json.dumps(value) == json.dumps(expected), key


def attending(control):
    names = ("Transformer2DModel",)
    return [module for module in control.modules() if type(module).__name__ in names]


def test_original_layout(case, tmp_path):
    """diffusers' own converter makes of our names what the ControlNet was, and we read it again."""
    _, control, folder, config, _ = case
    section, params = read_control(folder, config)
    if section["bgr"] or len(section["hint_channels"]) != 4:
        pytest.skip("the converter knows the published networks alone")
    path = tmp_path / "control.safetensors"
    write_control(path, section, params, "compvis")
    options = {"layers_per_block": control.config.layers_per_block}
    made = convert_controlnet_checkpoint(load_file(path), options)
    # The converter has no names for SDXL's vector, which no file of the original code had.
    equal(made, control, "add_embedding.")
    if not control.config.addition_embed_type:
        equal(ControlNetModel.from_single_file(path, config=str(folder)).state_dict(), control)


@pytest.mark.parametrize("named", ["diffusion_pytorch_model.bin", "shards", "weights alone"])
def test_other_forms_of_the_weights(named, tmp_path):
    unet, control = models("SD 2")
    unet.save_pretrained(tmp_path / "unet")
    config = read_component(tmp_path / "unet").config
    control.save_pretrained(tmp_path / "whole")
    section, expected = read_control(tmp_path / "whole", config)
    path = tmp_path / "other"
    if named == "shards":
        control.save_pretrained(path, max_shard_size="1MB")
        assert len(list(path.iterdir())) > 3
    elif named == "weights alone":
        path = tmp_path / "net.safetensors"
        save_file(control.state_dict(), path)
    else:
        control.save_pretrained(path, safe_serialization=False)
    found, params = read_control(path, config)
    assert found["hint_channels"] == section["hint_channels"]
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_checkpoint_of_torch(tmp_path):
    """The originals' `.pth`: the names of our "compvis" layout, pickled by torch."""
    unet, control = models("SD 1")
    unet.save_pretrained(tmp_path / "unet")
    control.save_pretrained(tmp_path / "control")
    config = read_component(tmp_path / "unet").config
    section, params = read_control(tmp_path / "control", config)
    write_control(tmp_path / "a.safetensors", section, params, "compvis")
    torch.save(load_file(tmp_path / "a.safetensors"), tmp_path / "control_sd15_canny.pth")
    torch.save({"state_dict": load_file(tmp_path / "a.safetensors")}, tmp_path / "a.ckpt")
    for name in ("control_sd15_canny.pth", "a.ckpt"):
        found = read_control(tmp_path / name, config)
        assert found[0] == section
        jax.tree.map(np.testing.assert_array_equal, found[1], params)


def relatives():
    size = dict(cross_attention_dim=24, down_block_types=(CROSS, PLAIN))
    like = size | dict(block_out_channels=(32, 64), layers_per_block=1)
    union = dict(addition_embed_type="text_time", addition_time_embed_dim=8, num_trans_head=4)
    union |= dict(projection_class_embeddings_input_dim=68)
    yield ControlNetUnionModel(**like, **union, num_trans_channel=32, num_proj_channel=32)
    small = dict(block_out_channels=(8, 16), base_block_out_channels=(32, 64))
    yield ControlNetXSAdapter(**size, **small, num_attention_heads=2, max_norm_num_groups=8)
    motion = ("CrossAttnDownBlockMotion", "DownBlockMotion")
    yield SparseControlNetModel(**like | dict(down_block_types=motion))


def test_relatives_of_diffusers_are_refused(tmp_path):
    """By their class, and their weights alone by their tensors."""
    config = {"unet": dict(model_channels=32, channel_mult=[1, 2], num_res_blocks=1)}
    for i, model in enumerate(relatives()):
        model.save_pretrained(tmp_path / f"{i}")
        with pytest.raises(ValueError, match=f"_class_name='{type(model).__name__}' is not supp"):
            read_control(tmp_path / f"{i}", config)
        (weights,) = (tmp_path / f"{i}").glob("*.safetensors")
        with pytest.raises(ValueError, match="is a .* which is not supported"):
            read_control(weights, config)
