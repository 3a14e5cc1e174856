"""Single files recognised by their tensors: the published models, and files that are none."""

import functools
import json

import jax
import numpy as np
import pytest

from ldm_jax.interop.compvis import dotted
from ldm_jax.interop.fields import canonical
from ldm_jax.interop.layout import slots
from ldm_jax.interop.recognise import recognise
from ldm_jax.published import AUTOENCODERS, MODELS
from tests.models.published import published
from tests.tiny_models import array, kl, masked

PREFIXES = {
    "openclip": "cond_stage_model.model.",
    "clip": "cond_stage_model.transformer.",
    "bert": "cond_stage_model.transformer.",
    "class": "cond_stage_model.",
    "rescaler": "cond_stage_model.",
}


@functools.cache
def _abstract(network, fields, layout):
    return {
        name: jax.ShapeDtypeStruct(slot.foreign, np.float32)
        for slot in slots(network, json.loads(fields), layout).values()
        for name in slot.names
    }


def abstract(network, fields, prefix="", layout="compvis"):
    """The tensors of a network as a file has them, as shapes alone."""
    tensors = _abstract(network, json.dumps(fields), layout)
    return {prefix + name: tensor for name, tensor in tensors.items()}


def conditioner(section, prefix=None):
    """The tensors of a section's network in a file."""
    fields = dict(section["network"])
    kind, layout = fields.pop("kind", section["kind"]), "compvis"
    if kind in ("text", "transformer"):
        kind, fields = "bert", {"vocab_size": 30522} | fields
    if kind == "rescaler":
        fields["in_channels"] = section["shape"][-1]
    if kind == "clip" and section["padding"] == "zero":
        layout = "openclip"
    place = prefix or PREFIXES[layout if layout == "openclip" else kind]
    return abstract(kind, fields, place, layout)


def file_of(config):
    """The tensors of a whole model as its authors released them, as shapes alone."""
    tensors = abstract("unet", config["unet"], "model.diffusion_model.")
    tensors |= abstract("autoencoder", config["autoencoder"], "first_stage_model.")
    sections = config["conditioning"]
    networks = [name for name, section in sections.items() if "network" in section]
    for i, name in enumerate(networks):
        places = {
            "text": f"conditioner.embedders.{i}.transformer.",
            "text_2": f"conditioner.embedders.{i}.model.",
        }
        tensors |= conditioner(sections[name], places[name] if "sizes" in sections else None)
    return tensors


# Its distance from 0 decides whether Stable Diffusion 2 predicts v.
NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
GUIDED = [name for name, model in MODELS.items() if model.learn_sigma]
OF_LATENTS = [name for name in MODELS if name not in GUIDED]
WHOLE = [n for n in OF_LATENTS if not n.startswith("sgm-") and n != "semantic_synthesis512"]


@pytest.mark.parametrize("name", WHOLE)
def test_every_published_model_is_recognised(name):
    config = published(name)
    tensors = file_of(config)
    if name in ("sd2", "sd2-v"):  # of the same shapes
        spread = 0.2 if name == "sd2-v" else 0.1
        tensors[NORM] = np.linspace(-spread, spread, 320, dtype=np.float32)
    found = recognise(tensors).config
    # `canonical` leaves out what changes nothing: factors in `attention_resolutions` that are
    # never reached (semantic_synthesis, bsr_sr), a depth or a flag of a level without attention
    # (SDXL's first, the upscaler's first), `use_spatial_transformer` where there is a context.
    ours, theirs = canonical(found), canonical(config)
    assert ours["unet"] == theirs["unet"]
    assert ours["autoencoder"] == theirs["autoencoder"]
    assert found["conditioning"] == config["conditioning"]
    assert found["diffusion"] == config["diffusion"]
    assert found["image_size"] == config["data"]["image_size"]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("name", OF_LATENTS)
def test_every_published_unet_is_recognised_alone(name):
    fields = published(name)["unet"]
    found = recognise(abstract("unet", fields)).config
    assert found["task"] == "unet"
    assert canonical(found) == canonical(dict(task="unet", unet=fields))


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_of_other_widths_is_like_the_published_one(name):
    config = published(name)
    config["unet"] |= dict(model_channels=64, channel_mult=[1, 2, 3, 4], num_res_blocks=1)
    config["unet"] |= dict(transformer_depth=1, disable_self_attentions=False)
    tensors = file_of(config) | {"v_pred": np.zeros(0)} if name == "sd2-v" else file_of(config)
    found = recognise(tensors).config
    ours, theirs = canonical(found), canonical(config)
    for section in ("unet", "conditioning", "diffusion"):
        assert ours[section] == theirs[section]
    assert found["image_size"] == config["data"]["image_size"]


@pytest.mark.parametrize(
    ("name", "changes", "like"),
    [
        # A flag, or the kind of autoencoder, is more decisive than widths.
        ("celeba256", dict(use_scale_shift_norm=True, resblock_updown=True), "lsun_churches256"),
        ("sd1", dict(use_linear_in_transformer=True), "sd2"),
        ("text2img256", dict(num_res_blocks=1, autoencoder=kl(1.0, 3)), "txt2img-1p4B"),
    ],
)
def test_which_published_model_another_is_like(name, changes, like):
    config = published(name)
    config["autoencoder"] = changes.pop("autoencoder", config["autoencoder"])
    config["unet"] |= changes
    values = {NORM: np.zeros(320, np.float32)} if name == "sd1" else {}
    found = recognise(file_of(config) | values)
    heads = [key for key in ("num_heads", "num_head_channels") if key in found.config["unet"]]
    assert {key: found.config["unet"][key] for key in heads}.items() <= MODELS[like].unet.items()
    assert found.name == MODELS[like].title
    assert found.config["diffusion"] == MODELS[like].noise


@pytest.mark.parametrize(
    ("name", "channels", "title", "section"),
    [
        ("sd1", 8, "Stable Diffusion 1", dict(concat=array("concat", None, None, 4))),
        ("sdxl-base", 9, "Stable Diffusion XL base inpainting", dict(masked_image=masked(4))),
        ("sd2-depth", 9, "Stable Diffusion 2 inpainting", dict(masked_image=masked(4))),
    ],
)
def test_what_stands_beside_the_latents_of_a_published_model(name, channels, title, section):
    """InstructPix2Pix has the latents of a picture there, SDXL's inpainting a masked picture."""
    config = published(name)
    config["unet"]["in_channels"] = channels
    found = recognise(file_of(config))
    assert found.name == title
    sections = {n: s for n, s in found.config["conditioning"].items() if "network" not in s}
    sections.pop("sizes", None)
    assert sections == section


@pytest.mark.parametrize("name", GUIDED)
def test_guided_diffusion_is_a_whole_model_of_pixels(name):
    model = MODELS[name]
    found = recognise(abstract("unet", model.unet | dict(out_channels=6)))
    assert found.name == model.title
    expected = dict(unet=model.unet, autoencoder=dict(kind="identity"), conditioning={})
    expected["conditioning"] |= model.conditions
    ours, theirs = canonical(found.config), canonical(json.loads(json.dumps(expected)))
    for section in ("unet", "autoencoder", "conditioning"):
        assert ours[section] == theirs[section]
    assert found.config["diffusion"] == model.noise
    assert found.config["image_size"] == model.size
    assert found.config["sampling"]["guidance"] == 1.0
    (part,) = found.parts.values()
    assert part.fields["out_channels"] == 3 and part.learn_sigma
    assert part.new_attention_order == (name == "adm-64")


def test_guided_diffusion_of_other_widths():
    """Choi et al. 2022's of faces: one ResBlock a level, attention at 16 pixels alone."""
    fields = MODELS["adm-256-uncond"].unet | dict(model_channels=128, num_res_blocks=1)
    fields |= dict(attention_resolutions=(16,), out_channels=6)
    found = recognise(abstract("unet", fields))
    assert found.config["image_size"] == 256
    assert found.config["unet"]["num_head_channels"] == 64
    assert found.config["conditioning"] == {}
    assert found.config["unet"]["out_channels"] == 3


def test_a_unet_that_is_like_no_published_one():
    fields = published("celeba256")["unet"] | dict(in_channels=5)
    message = "is no published model's: a UNet with in_channels=5, .* conditioned by nothing"
    with pytest.raises(ValueError, match=message):
        recognise(abstract("unet", fields))


@pytest.mark.parametrize("name", [n for n in AUTOENCODERS if n != "taesd"])
def test_every_published_autoencoder_is_recognised_alone(name):
    fields = published(name)["autoencoder"]
    found = recognise(abstract("autoencoder", fields)).config
    assert found["task"] == "autoencoder"
    found["autoencoder"]["scale_factor"] = fields.get("scale_factor", 1.0)  # no shape tells it
    assert canonical(found) == canonical(dict(task="autoencoder", autoencoder=fields))


@pytest.mark.parametrize("name", OF_LATENTS)
def test_averages_have_the_names_of_what_they_average(name):
    names = list(abstract("unet", published(name)["unet"]))
    assert [dotted(name.replace(".", "")) for name in names] == names
