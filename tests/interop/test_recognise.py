"""What is read off the tensors of single files: the published models, and files that are none."""

import functools
import json

import jax
import numpy as np
import pytest

from ldm_jax.interop.compvis import dotted
from ldm_jax.interop.fields import (
    canonical_autoencoder,
    canonical_unet,
)
from ldm_jax.interop.layout import slots
from ldm_jax.interop.recognise import recognise
from tests.models.published import AUTOENCODER_SIZES, UNET_SIZES, published

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


def with_defaults(sections):
    """Sections whose text transformers spell out what published.py leaves to the defaults."""
    filled = json.loads(json.dumps(sections))
    for section in filled.values():
        if section.get("network", {}).get("kind") == "transformer":
            section["network"] = {"heads": 8, "head_dim": 64} | section["network"]
    return filled


WHOLE = [n for n in UNET_SIZES if not n.startswith("sgm-") and n != "semantic_synthesis512"]


@pytest.mark.parametrize("name", WHOLE)
def test_every_published_model_is_recognised(name):
    config = published(name)
    tensors = file_of(config)
    if name in ("sd2", "sd2-v"):  # of the same shapes, and told apart by how far this one has moved
        norm = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
        spread = 0.2 if name == "sd2-v" else 0.1
        tensors[norm] = np.linspace(-spread, spread, 320, dtype=np.float32)
    found = recognise(tensors).config
    # `canonical_unet` leaves away what changes nothing: factors in `attention_resolutions` that are
    # never reached (semantic_synthesis, bsr_sr), a depth or a flag of a level without attention
    # (SDXL's first, the upscaler's first), `use_spatial_transformer` where there is a context.
    assert canonical_unet(found["unet"]) == canonical_unet(config["unet"])
    assert canonical_autoencoder(found["autoencoder"]) == canonical_autoencoder(
        config["autoencoder"]
    )
    assert found["conditioning"] == with_defaults(config["conditioning"])
    assert found["diffusion"] == config["diffusion"]
    assert found["image_size"] == config["data"]["image_size"]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("name", UNET_SIZES)
def test_every_published_unet_is_recognised_alone(name):
    fields = published(name)["unet"]
    found = recognise(abstract("unet", fields)).config
    assert found["task"] == "unet"
    assert canonical_unet(found["unet"]) == canonical_unet(fields)


@pytest.mark.parametrize("name", [n for n in AUTOENCODER_SIZES if n != "taesd"])
def test_every_published_autoencoder_is_recognised_alone(name):
    fields = published(name)["autoencoder"]
    found = recognise(abstract("autoencoder", fields)).config
    assert found["task"] == "autoencoder"
    found["autoencoder"]["scale_factor"] = fields.get("scale_factor", 1.0)  # no shape tells it
    assert canonical_autoencoder(found["autoencoder"]) == canonical_autoencoder(fields)


@pytest.mark.parametrize("name", UNET_SIZES)
def test_averages_have_the_names_of_what_they_average(name):
    names = list(abstract("unet", published(name)["unet"]))
    assert [dotted(name.replace(".", "")) for name in names] == names
