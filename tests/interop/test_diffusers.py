"""Folders of diffusers: what we write is read back; what we cannot be is refused by name."""

import json
import shutil

import numpy as np
import pytest

from ldm_jax.interop import diffusers
from ldm_jax.interop.fields import canonical
from ldm_jax.interop.files import open_state, write_safetensors
from ldm_jax.interop.opening import read_any
from tests.interop.systems import SYSTEMS, edit, random_params, system
from tests.interop.test_compvis import same

# What no pipeline of diffusers is.
NOT_THERE = {"cin256-v2", "churches256", "inpainting_big", "semantic_synthesis256", "upscaler"}
WRITABLE = [name for name in SYSTEMS if name not in NOT_THERE]


def read(folder):
    alone = not (folder / "model_index.json").exists()
    return (diffusers.read_component if alone else diffusers.read)(folder)


@pytest.mark.parametrize("name", WRITABLE)
def test_a_system_comes_back(name, folders, tmp_path):
    folder, config, params = folders(name)
    found = read(folder)
    assert all(report == type(report)() for report in found.reports.values())
    same(found.params, params)
    diffusers.write(tmp_path / "again", found.config, found.params)
    again = read(tmp_path / "again")
    assert again.config == found.config
    same(again.params, params)
    assert json.loads(json.dumps(found.config)) == found.config
    for section in ("task", "image_size", "autoencoder"):
        assert found.config.get(section) == config.get(section)
    if config["task"] == "diffusion":
        assert canonical(found.config)["unet"] == canonical(config)["unet"]
        assert found.config["conditioning"] == config["conditioning"]
        for key in ("schedule", "parameterization", "spacing"):
            assert found.config["diffusion"][key] == config["diffusion"][key]


@pytest.mark.parametrize("name", sorted(NOT_THERE))
def test_what_diffusers_has_no_pipeline_for_is_not_written(name, tmp_path):
    config = system(name)
    # Of the churches' UNet, UNet2DModel has no 8 heads at every width.
    with pytest.raises(ValueError, match="conditioning|num_heads=8 at widths"):
        diffusers.write(tmp_path / "folder", config, random_params(config))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "pipeline", "components"),
    [
        (
            "stable-diffusion-1",
            "StableDiffusionPipeline",
            "scheduler text_encoder tokenizer unet vae",
        ),
        ("stable-diffusion-1-inpainting", "StableDiffusionInpaintPipeline", None),
        ("ldm3d", "StableDiffusionLDM3DPipeline", None),
        ("stable-diffusion-xl-base", "StableDiffusionXLPipeline", None),
        ("stable-diffusion-xl-refiner", "StableDiffusionXLImg2ImgPipeline", None),
        ("ldm-celebahq-256", "LDMPipeline", "scheduler unet vqvae"),
        ("ldm-text2im-large-256", "LDMTextToImagePipeline", "bert scheduler tokenizer unet vqvae"),
    ],
)
def test_the_pipeline_of_a_system(name, pipeline, components, folders):
    folder = folders(name)[0]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == pipeline
    if components:
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
        assert inside == components.split()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            dict(unet=["diffusers", "UNet3DConditionModel"]),
            "unet is of class 'UNet3DConditionModel'",
        ),
        (dict(text_encoder=["transformers", "T5EncoderModel"]), "'T5EncoderModel': known are CLIP"),
        (dict(transformer=["diffusers", "SD3Transformer2DModel"]), "transformer='SD3Transformer2D"),
        (dict(scheduler=["diffusers", "EDMEulerScheduler"]), "'EDMEulerScheduler': known are DDIM"),
        (dict(vae=["diffusers", "AsymmetricAutoencoderKL"]), "vae is of class 'Asymmetric"),
        (dict(unet=[None, None]), "names no unet"),
        (dict(tokenizer="absent"), "names no tokenizer"),
    ],
)
def test_classes_that_we_do_not_know(entry, message, copied):
    folder = copied("stable-diffusion-1")
    edit(folder / "model_index.json", **entry)
    with pytest.raises(ValueError, match=f"model_index.json.*{message}"):
        diffusers.read(folder)


def test_what_else_a_pipeline_has_is_passed_over(copied):
    folder = copied("stable-diffusion-1")
    before = diffusers.read(folder).config
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
    )
    assert diffusers.read(folder).config == before


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_damaged_json(content, copied):
    folder = copied("stable-diffusion-1")
    (folder / "unet" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"unet/config.json (is not JSON|holds a)"):
        diffusers.read(folder)


def test_missing_files_and_keys(copied):
    folder = copied("stable-diffusion-1")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = dict(open_state(weights))
    del tensors["conv_out.bias"]
    tensors["conv_in.bias"] = np.zeros(3, np.float32)
    write_safetensors(weights, tensors | {"more": np.zeros(1)})
    report = diffusers.read(folder).reports["unet"]
    assert report.missing == ("conv_out.bias",)
    assert report.extra == ("more",)
    assert report.misshapen == ("conv_in.bias: expected (64,), found (3,)",)
    write_safetensors(weights, tensors | {"conv_in.bias": np.full(64, np.nan, np.float32)})
    with pytest.raises(ValueError, match=r"model.safetensors: conv_in.bias holds NaN"):
        diffusers.read(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*unet"):
        diffusers.read(folder)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"vae/config.json is missing"):
        diffusers.read(folder)


def test_older_names_of_attention(copied):
    folder = copied("ldm-celebahq-256")
    before = diffusers.read(folder).params
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for component in ("unet", "vqvae"):
        weights = folder / component / "diffusion_pytorch_model.safetensors"
        tensors = dict(open_state(weights))
        for new, name in old.items():
            tensors = {k.replace(f".{new}.", f".{name}."): v for k, v in tensors.items()}
        assert any("proj_attn" in name for name in tensors)
        write_safetensors(weights, tensors)
    same(diffusers.read(folder).params, before)


@pytest.mark.parametrize(
    ("system_name", "section", "fields", "message"),
    [
        ("stable-diffusion-1", "autoencoder", dict(patch_size=2), "patch_size=2"),
        ("stable-diffusion-1", "autoencoder", dict(encoder_ch=64), "encoder_ch=64"),
        ("stable-diffusion-1", "autoencoder", dict(local=True, mid_attn=False), "local=True"),
        (
            "stable-diffusion-1",
            "diffusion",
            dict(parameterization="flow"),
            "parameterization='flow'",
        ),
        ("stable-diffusion-1", "diffusion", dict(spacing="karras"), "spacing='karras'"),
        ("ldm-celebahq-256", "diffusion", dict(schedule=dict(name="edm")), "schedule.name='edm'"),
    ],
)
def test_what_diffusers_cannot_say_is_not_written(system_name, section, fields, message, tmp_path):
    config = system(system_name)
    params = random_params(config)
    config[section] |= fields
    with pytest.raises(ValueError, match=message):
        diffusers.write(tmp_path / "folder", config, params)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "section", "change", "message"),
    [
        ("stable-diffusion-1", "text", dict(zero_null=True), "text: zero_null=True, where a pipe"),
        ("stable-diffusion-1", "text", dict(pooled=True), "text: pooled=True, where a pipeline"),
        ("stable-diffusion-1", "text", dict(context=False), "text: context=False, where a pipeli"),
        ("stable-diffusion-xl-base", "text_2", dict(pooled=False), "text_2: pooled=False"),
        ("stable-diffusion-xl-base", "text", dict(zero_null=False), "text: zero_null=False, where"),
        ("stable-diffusion-xl-base", "sizes", dict(fields=["crop"]), "sizes .'crop'.: not"),
        ("stable-diffusion-1-inpainting", "masked_image", dict(hole=-1.0), "masked_image: not as"),
    ],
)
def test_what_a_pipeline_would_do_otherwise_is_not_written(
    name, section, change, message, folders, tmp_path
):
    config, params = system(name), folders(name)[2]
    config["conditioning"][section] |= change
    with pytest.raises(ValueError, match=f"conditioning.{message}"):
        diffusers.write(tmp_path / "folder", config, params)
    assert not list(tmp_path.iterdir())


def test_text_encoders_in_another_order_are_not_written(folders, tmp_path):
    config, params = system("stable-diffusion-xl-base"), folders("stable-diffusion-xl-base")[2]
    config["conditioning"] = dict(reversed(config["conditioning"].items()))
    with pytest.raises(ValueError, match="conditioning .* no pipeline of diffusers has these"):
        diffusers.write(tmp_path / "folder", config, params)


def test_a_folder_with_something_in_it_is_left_alone(folders, tmp_path):
    _, config, params = folders("sdxl-vae")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        diffusers.write(tmp_path, config, params)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_unets_and_what_is_neither(folders, tmp_path):
    folder, config, params = folders("stable-diffusion-1")
    found = diffusers.read_component(folder / "unet")
    assert found.config["task"] == "unet"
    same(found.params, {"unet": params["unet"]})
    (tmp_path / "config.json").write_text(json.dumps(dict(_class_name="ControlNetModel")))
    with pytest.raises(ValueError, match="_class_name='ControlNetModel' is not supported"):
        diffusers.read_component(tmp_path)


def test_the_tiny_autoencoder(tmp_path):
    fields = dict(kind="tiny", width=8, encoder_blocks=[1, 2], decoder_blocks=[2, 1])
    config = dict(task="autoencoder", autoencoder=fields)
    params = random_params(config)
    diffusers.write(tmp_path / "taesd", config, params)
    found = diffusers.read_component(tmp_path / "taesd")
    same(found.params, params)
    whole = dict(in_channels=3, out_channels=3, latent_channels=4) | fields
    assert found.config["autoencoder"] == whole


def lacking(folder, component, how):
    """Takes a component away: out of the index, or from the disk."""
    if how == "null":
        edit(folder / "model_index.json", **{component: [None, None]})
    else:
        shutil.rmtree(folder / component)


@pytest.mark.parametrize("how", ["null", "absent"])
def test_a_folder_without_an_autoencoder(how, copied, folders):
    folder = copied("stable-diffusion-1")
    whole = diffusers.read(folder)
    lacking(folder, "vae", how)
    message = r"has .*unet \(UNet2DConditionModel\).*, but no autoencoder \(vae\): .*autoencoder="
    with pytest.raises(ValueError, match=message):
        diffusers.read(folder)
    alone, _, params = folders("sdxl-vae")
    found = read_any(folder, autoencoder=alone)
    same(found.params, whole.params | params)
    assert found.config["autoencoder"]["scale_factor"] == 0.13025
    # A whole model has one, too.
    other = folders("ldm-text2im-large-256")[0]
    found = read_any(folder, autoencoder=other)
    same(found.params, whole.params | {"autoencoder": diffusers.read(other).params["autoencoder"]})
    with pytest.raises(ValueError, match="vq-f4 .* has latents of 3 channels, the model of 4"):
        read_any(folder, autoencoder=folders("vq-f4")[0])


def test_an_autoencoder_in_place_of_the_own_one(copied, folders):
    folder = copied("stable-diffusion-1")
    found = read_any(folder, autoencoder=folders("sdxl-vae")[0])
    same(found.params["autoencoder"], folders("sdxl-vae")[2]["autoencoder"])
    assert found.config["autoencoder"]["scale_factor"] == 0.18215  # the latents are the model's
    # Whatever the own one is.
    edit(folder / "model_index.json", vae=["diffusers", "AsymmetricAutoencoderKL"])
    with pytest.raises(ValueError, match="vae is of class 'AsymmetricAutoencoderKL'"):
        diffusers.read(folder)
    found = read_any(folder, autoencoder=folders("sdxl-vae")[0])
    same(found.params["autoencoder"], folders("sdxl-vae")[2]["autoencoder"])


@pytest.mark.parametrize("how", ["null", "absent"])
@pytest.mark.parametrize(
    ("name", "components", "message"),
    [
        ("stable-diffusion-1", ["text_encoder"], "no text encoder, of the width 64 that its UNet"),
        (
            "stable-diffusion-xl-base",
            ["text_encoder", "text_encoder_2"],
            "no text encoder, of the width 192 that its UNet attends to: .*text=",
        ),
        (
            "stable-diffusion-xl-base",
            ["text_encoder"],
            r"cross_attention_dim=192, but the text encoders \['text_2'\] are \[128\] .*text=",
        ),
        ("ldm-text2im-large-256", ["bert"], "no text encoder, of the width 32"),
    ],
)
def test_a_folder_without_a_text_encoder(name, components, message, how, copied, folders):
    folder = copied(name)
    whole = diffusers.read(folder)
    for component in components:
        lacking(folder, component, how)
    with pytest.raises(ValueError, match=message):
        diffusers.read(folder)
    found = read_any(folder, text=folders(name)[0])
    assert found.config["conditioning"] == whole.config["conditioning"]
    same(found.params, whole.params)
    with pytest.raises(ValueError, match="text=.*sdxl-vae holds none, but AutoencoderKL"):
        read_any(folder, text=folders("sdxl-vae")[0])


def test_text_of_another_width_is_refused(copied, folders):
    folder = copied("stable-diffusion-1")
    with pytest.raises(ValueError, match=r"cross_attention_dim=64, but .* are \[128\] wide"):
        read_any(folder, text=folders("stable-diffusion-2")[0])
