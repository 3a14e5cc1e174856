"""Writes our config and parameters as a folder of diffusers."""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.interop.diffusers.components import (
    VERSION,
    Fields,
    autoencoder_to,
    dump,
    encoder_to,
)
from ldm_jax.interop.diffusers.reading import NUMBERS, TEXTS, WEIGHTS, used
from ldm_jax.interop.diffusers.schedulers import scheduler_to
from ldm_jax.interop.diffusers.tokenizers import tokenizer_class, write_tokenizer
from ldm_jax.interop.diffusers.unets import unet_to
from ldm_jax.interop.files import write_safetensors
from ldm_jax.interop.layout import Slot, slots, write_params
from ldm_jax.interop.networks import networks
from ldm_jax.models.build import make_autoencoder
from ldm_jax.models.clip import CLIPText, layer_index

# Prefix of a pipeline's name → components that it requires and that we do not have.
EMPTY = {
    "StableDiffusionXL": ("text_encoder", "tokenizer", "feature_extractor", "image_encoder"),
    "StableDiffusion": ("safety_checker", "feature_extractor", "image_encoder"),
    "LatentConsistency": ("safety_checker", "feature_extractor", "image_encoder"),
    "LDM": (),
}


def _check_encoder(name: str, section: Fields, xl: bool, zeros: bool) -> None:
    """Raises ValueError if a pipeline of diffusers would use a text encoder differently."""
    network, (keys, layer) = CLIPText(**section["network"]), used(xl, name == "text_2", zeros)
    if name == "text_2" and network.projection is None:
        raise ValueError(f"conditioning.{name}.network.projection: SDXL's second encoder has one")
    places = [layer_index(key, network.depth) for key in (network.layer, layer["layer"])]
    same = places[0] % (network.depth + 1) == places[1] % (network.depth + 1)
    ours = {key: section.get(key, key == "context") for key in keys}
    ours |= dict(layer=layer["layer"] if same else network.layer, final_norm=network.final_norm)
    for key, value in (keys | layer).items():
        if ours[key] != value:
            raise ValueError(
                f"conditioning.{name}: {key}={ours[key]!r}, where a pipeline of diffusers has "
                f"{value!r}"
            )


def _pipeline_class(config: Fields) -> tuple[str, Fields]:
    """The class and options of a model's pipeline. ValueError if there is none."""
    sections = config["conditioning"]
    kinds = {name: section["kind"] for name, section in sections.items()}
    by_kind = {section["kind"]: section for section in sections.values()}
    texts = [name for name, kind in kinds.items() if kind == "clip"]
    xl, mask = "sizes" in by_kind, by_kind.get("masked_image")
    if not kinds:
        return "LDMPipeline", {}
    if list(kinds.values()) == ["text"]:
        return "LDMTextToImagePipeline", {}
    known = (["text_2"], ["text", "text_2"]) if xl else (["text"],)
    if by_kind.keys() - {"clip", "sizes", "masked_image"} or texts not in known:
        raise ValueError(f"conditioning {kinds}: no pipeline of diffusers has these")
    zeros = xl and sections["text_2"].get("zero_null", False)
    for name in texts:
        _check_encoder(name, sections[name], xl, zeros)
    if mask and (not mask["mask_first"] or mask["hole"] != 0.0 or mask["mask_range"] != [0, 1]):
        raise ValueError("conditioning.masked_image: not as Stable Diffusion has it")
    if not xl:
        name = "StableDiffusionInpaintPipeline" if mask else "StableDiffusionPipeline"
        if config["autoencoder"].get("out_ch", 3) == 6:
            name = "StableDiffusionLDM3DPipeline"
        elif config["unet"].get("time_cond_proj_dim") and config["diffusion"]["spacing"] == "lcm":
            name = "LatentConsistencyModelPipeline"
        return name, dict(requires_safety_checker=False)
    fields, options = by_kind["sizes"]["fields"], dict(force_zeros_for_empty_prompt=zeros)
    aesthetic = next((key for key, numbers in NUMBERS.items() if numbers == fields), None)
    if aesthetic is None:
        raise ValueError(f"conditioning.sizes {fields}: not as in SDXL")
    if not (aesthetic or mask or "text" not in texts):
        return "StableDiffusionXLPipeline", options
    name = "StableDiffusionXLInpaintPipeline" if mask else "StableDiffusionXLImg2ImgPipeline"
    return name, options | dict(requires_aesthetics_score=aesthetic)


def _write_network(
    place: Path, content: Fields, table: dict[str, Slot], params: Any, dtype: np.dtype
) -> list[str]:
    """Writes JSON and weights of a component. Returns its entry in the index."""
    dump(place / "config.json", content)
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype, copy=False), params)
    stem = WEIGHTS if "_class_name" in content else "model"
    tensors = write_params(params, table)
    write_safetensors(place / f"{stem}.safetensors", tensors, {"format": "pt"})
    if "_class_name" in content:
        return ["diffusers", content["_class_name"]]
    (name,) = content["architectures"]
    return ["latent_diffusion" if name == "LDMBertModel" else "transformers", name]


def _write_all(folder: Path, config: Fields, params: dict[str, Any], dtype: np.dtype) -> None:
    task = config["task"]
    size = config.get("image_size") or config.get("data", {}).get("image_size", 512)
    if task not in ("autoencoder", "diffusion"):
        raise ValueError(f"task={task!r}: what diffusers reads is a whole model or an autoencoder")
    autoencoder = autoencoder_to(config["autoencoder"], size)
    if task == "autoencoder":
        table = slots(task, config[task], "diffusers")
        _write_network(folder, autoencoder, table, params[task], dtype)
        return
    name, options = _pipeline_class(config)
    vector = "add_embedding" if name.startswith("StableDiffusionXL") else "class_embedding"
    prefix = next(prefix for prefix in EMPTY if name.startswith(prefix))
    index: Fields = dict(_class_name=name, _diffusers_version=VERSION)
    index |= {component: [None, None] for component in EMPTY[prefix]}
    sections = config["conditioning"]
    side = size // make_autoencoder(config["autoencoder"]).downsampling
    dims = [section.get("dim", 256) for section in sections.values() if section["kind"] == "sizes"]
    beside = dict(sample_size=side, vector=vector, addition_time_embed_dim=(*dims, 256)[0])
    for key, (network, fields) in networks(config).items():
        if key == "unet":
            place, content = key, unet_to(fields, **beside)
        elif key == "autoencoder":
            place, content = "vqvae" if prefix == "LDM" else "vae", autoencoder
        else:
            place = "bert" if network == "bert" else key.replace("text", "text_encoder")
            content, tokens = encoder_to(network, fields), TEXTS[place][1]
            write_tokenizer(folder / tokens, sections[key], fields.get("max_length", 77))
            index[tokens] = ["transformers", tokenizer_class(sections[key])]
        table = slots(network, fields, "diffusers", vector)
        index[place] = _write_network(folder / place, content, table, params[key], dtype)
    scheduler = scheduler_to(config["diffusion"])
    dump(folder / "scheduler" / "scheduler_config.json", scheduler)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    dump(folder / "model_index.json", index | options)


def write(
    folder: str | os.PathLike,
    config: dict[str, Any],
    params: dict[str, Any],
    dtype: Any = "float32",
) -> None:
    """Writes a folder for `diffusers.DiffusionPipeline.from_pretrained` or, for an autoencoder,
    `AutoencoderKL.from_pretrained` and the like.

    It includes the tokenizer, and a scheduler with the model's noise and grid. The folder is
    written whole or not at all; it must be empty or not exist.

    Raises:
      FileExistsError: the folder is not empty.
      ValueError: a model that diffusers' classes cannot express, with the field.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: nothing is written")
    part = folder.absolute().with_name(folder.absolute().name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _write_all(part, config, params, jnp.dtype(dtype))
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
