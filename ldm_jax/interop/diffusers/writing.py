"""From our config and parameters to a folder of diffusers."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditions.tokenizer import make_tokenizer
from ldm_jax.interop.diffusers.components import (
    VERSION,
    autoencoder_to,
    bert_to,
    clip_to,
)
from ldm_jax.interop.diffusers.schedulers import scheduler_to
from ldm_jax.interop.diffusers.tokenizers import tokenizer_class, write_tokenizer
from ldm_jax.interop.diffusers.unets import unet_to
from ldm_jax.interop.files import write_safetensors
from ldm_jax.interop.layout import slots, write_params
from ldm_jax.models.clip import layer_index

WEIGHTS = "diffusion_pytorch_model"
# Section of ours → the component of a pipeline whose encoder it is.
ENCODER_OF = {"text": "text_encoder", "text_2": "text_encoder_2"}


def networks(config: dict[str, Any], stage: str) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Network of ours → its component in a pipeline, its name in `layout`, its fields."""
    found = {
        "unet": ("unet", "unet", config["unet"]),
        "autoencoder": (stage, "autoencoder", config["autoencoder"]),
    }
    for name, section in config["conditioning"].items():
        if section["kind"] == "clip":
            found[name] = (ENCODER_OF[name], "clip", section["network"])
        elif section["kind"] == "text":
            size = make_tokenizer(section, 1).size
            found[name] = ("bert", "bert", section["network"] | dict(vocab_size=size))
    return found


def _check_encoder(name: str, section: dict[str, Any], xl: bool) -> None:
    """Raises ValueError if a pipeline of diffusers would use a text encoder in another way."""
    network = section["network"]
    layer = layer_index(network.get("layer", "last"), network.get("depth", 12))
    layer -= network.get("depth", 12) + 1 if layer >= 0 else 0
    expected = (-2, False) if xl else (-1, True)
    if (layer, network.get("final_norm", True)) != expected or not section.get("context", True):
        raise ValueError(
            f"conditioning.{name}: layer={network.get('layer', 'last')!r}, final_norm="
            f"{network.get('final_norm', True)}: diffusers takes layer {expected[0]}, final_norm="
            f"{expected[1]}"
        )
    if xl and name == "text_2" and network.get("projection") is None:
        raise ValueError(f"conditioning.{name}.network.projection: SDXL's second encoder has one")
    if section.get("pooled", False) and not (xl and name == "text_2"):
        raise ValueError(f"conditioning.{name}.pooled: diffusers pools SDXL's second encoder only")


def _pipeline_class(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class of pipeline that a model is, and its options. ValueError if there is none."""
    sections = config["conditioning"]
    kinds = {name: section["kind"] for name, section in sections.items()}
    texts = sorted(name for name, kind in kinds.items() if kind == "clip")
    xl, masked = "sizes" in kinds.values(), "masked_image" in kinds.values()
    rest = [k for k in kinds.values() if k not in ("clip", "sizes", "masked_image")]
    if not kinds:
        return "LDMPipeline", {}
    if list(kinds.values()) == ["text"]:
        return "LDMTextToImagePipeline", {}
    if rest or not texts or not set(texts) <= ENCODER_OF.keys():
        raise ValueError(f"conditioning {kinds}: no pipeline of diffusers is told this")
    for name in texts:
        _check_encoder(name, sections[name], xl)
    mask = next((s for s in sections.values() if s["kind"] == "masked_image"), None)
    if masked and (not mask["mask_first"] or mask["hole"] != 0.0 or mask["mask_range"] != [0, 1]):
        raise ValueError("conditioning.masked_image: not as Stable Diffusion has it")
    if not xl:
        if texts != ["text"]:
            raise ValueError(f"conditioning {texts}: Stable Diffusion has one text encoder, 'text'")
        if config["autoencoder"].get("out_ch", 3) == 6:
            return "StableDiffusionLDM3DPipeline", dict(requires_safety_checker=False)
        name = "StableDiffusionInpaintPipeline" if masked else "StableDiffusionPipeline"
        return name, dict(requires_safety_checker=False)
    zeros = {sections[name].get("zero_null", False) for name in texts}
    fields = next(s["fields"] for s in sections.values() if s["kind"] == "sizes")
    known = {"target_size": False, "aesthetic_score": True}
    if fields[:2] != ["original_size", "crop"] or fields[2] not in known or len(zeros) > 1:
        raise ValueError(f"conditioning.sizes {fields}, zero_null {zeros}: not as SDXL has them")
    options: dict[str, Any] = dict(force_zeros_for_empty_prompt=zeros.pop())
    if known[fields[2]] or masked or "text" not in texts:
        options["requires_aesthetics_score"] = known[fields[2]]
        if masked:
            return "StableDiffusionXLInpaintPipeline", options
        return "StableDiffusionXLImg2ImgPipeline", options
    return "StableDiffusionXLPipeline", options


# Components that a pipeline asks for and we have nothing of.
EMPTY = {
    "StableDiffusionXL": ("text_encoder", "tokenizer", "feature_extractor", "image_encoder"),
    "StableDiffusion": ("safety_checker", "feature_extractor", "image_encoder"),
    "LDM": (),
}


def _write_all(folder: Path, config: dict[str, Any], params: dict[str, Any], dtype: Any) -> None:
    kind = jnp.dtype(dtype)

    def dump(place: str, content: dict[str, Any]) -> None:
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def weights(place: Path, name: str, network: str, fields: dict[str, Any], vector: str) -> None:
        tree = jax.tree.map(lambda leaf: np.asarray(leaf).astype(kind, copy=False), params[name])
        tensors = write_params(tree, slots(network, fields, "diffusers", vector))
        stem = "model" if network in ("clip", "bert") else WEIGHTS
        write_safetensors(place / f"{stem}.safetensors", tensors, {"format": "pt"})

    task = config["task"]
    size = config.get("image_size") or config.get("data", {}).get("image_size", 512)
    if task == "autoencoder":
        dump("config.json", autoencoder_to(config[task], size))
        weights(folder, task, task, config[task], "add_embedding")
        return
    if task != "diffusion":
        raise ValueError(f"task={task!r}: what diffusers reads is a whole model or an autoencoder")
    name, options = _pipeline_class(config)
    xl = name.startswith("StableDiffusionXL")
    vector = "add_embedding" if xl else "class_embedding"
    stage = "vqvae" if name.startswith("LDM") else "vae"
    described = autoencoder_to(config["autoencoder"], size)
    levels = len(described.get("block_out_channels") or described["num_encoder_blocks"])
    contents = {
        "unet": unet_to(config["unet"], size // 2 ** (levels - 1), vector),
        stage: described,
    }
    index: dict[str, Any] = dict(_class_name=name, _diffusers_version=VERSION)
    prefix = next(prefix for prefix in EMPTY if name.startswith(prefix))
    index |= {component: [None, None] for component in EMPTY[prefix]}
    parts = networks(config, stage)
    for key, (component, network, fields) in parts.items():
        if network in ("clip", "bert"):
            contents[component] = (clip_to if network == "clip" else bert_to)(fields)
            tokens = component.replace("text_encoder", "tokenizer").replace("bert", "tokenizer")
            section = config["conditioning"][key]
            write_tokenizer(folder / tokens, section, fields.get("max_length", 77))
            index[tokens] = ["transformers", tokenizer_class(section)]
        elif component not in contents:
            raise ValueError(f"no component of diffusers for {key}")
    for component, content in contents.items():
        dump(f"{component}/config.json", content)
        transformer = "architectures" in content
        library = "transformers" if transformer else "diffusers"
        library = "latent_diffusion" if component == "bert" else library
        index[component] = [
            library,
            content["architectures"][0] if transformer else content["_class_name"],
        ]
    scheduler = scheduler_to(config["diffusion"])
    dump("scheduler/scheduler_config.json", scheduler)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    for key, (component, network, fields) in parts.items():
        weights(folder / component, key, network, fields, vector)
    dump("model_index.json", index | options)


def write(
    folder: str | os.PathLike,
    config: dict[str, Any],
    params: dict[str, Any],
    dtype: Any = "float32",
) -> None:
    """Writes a folder that `diffusers.DiffusionPipeline.from_pretrained` opens, or, of an
    autoencoder, `AutoencoderKL.from_pretrained` and its like.

    With it come the tokenizer, and a DDIM scheduler with the model's noise and grid. The folder
    appears whole or not at all; it must not exist, or be empty.

    Raises:
      FileExistsError: there is something in the folder.
      ValueError: a model that diffusers' classes cannot express, with the field.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: nothing is written")
    part = folder.absolute().with_name(folder.absolute().name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _write_all(part, config, params, dtype)
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
