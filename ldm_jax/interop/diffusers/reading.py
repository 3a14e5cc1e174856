"""From a folder of diffusers to our config and parameters."""

import os
from pathlib import Path
from typing import Any

from ldm_jax.conditions.tokenizer import make_tokenizer
from ldm_jax.interop.diffusers.components import (
    Json,
    autoencoder_from,
    bert_from,
    clip_from,
    load,
)
from ldm_jax.interop.diffusers.schedulers import SCHEDULERS, diffusion_from
from ldm_jax.interop.diffusers.tokenizers import read_tokenizer
from ldm_jax.interop.diffusers.unets import UNETS, unet_from
from ldm_jax.interop.diffusers.writing import ENCODER_OF, WEIGHTS, networks
from ldm_jax.interop.families import array, concat_sections
from ldm_jax.interop.files import open_shards
from ldm_jax.interop.layout import Imported, read_params, slots

AUTOENCODERS = ("AutoencoderKL", "VQModel", "AutoencoderTiny")
ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "LDMBertModel")
# Component → classes that are known.
KNOWN = {
    "unet": tuple(UNETS),
    "vae": AUTOENCODERS,
    "vqvae": AUTOENCODERS,
    "text_encoder": ENCODERS[:2],
    "text_encoder_2": ENCODERS[:2],
    "bert": ENCODERS[2:],
    "tokenizer": (),  # any: see `read_tokenizer`
    "tokenizer_2": (),
    "scheduler": tuple(SCHEDULERS),
}
# Of no part in what a prompt becomes, or what the caller brings the result of.
PASSED_OVER = (
    *("safety_checker", "feature_extractor", "image_encoder", "watermark", "watermarker"),
    *("depth_estimator", "low_res_scheduler", "image_normalizer", "image_noising_scheduler"),
)


class _Pipeline:
    """The `model_index.json` of a folder: which components there are, and of what class."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "model_index.json"
        content = load(self.path)
        self.name = content.pop("_class_name", "")
        self.options = {key: v for key, v in content.items() if not isinstance(v, list)}
        self.classes = {k: v[1] for k, v in content.items() if isinstance(v, list) and any(v)}
        for name, cls in self.classes.items():
            if name in PASSED_OVER:
                continue
            if name not in KNOWN:
                raise ValueError(
                    f"{self.path}: {name}={cls!r} is no component of a latent diffusion model that "
                    f"we know: {', '.join(KNOWN)}"
                )
            if KNOWN[name] and cls not in KNOWN[name]:
                raise ValueError(
                    f"{self.path}: {name} is of class {cls!r}: known are {', '.join(KNOWN[name])}"
                )

    def json(self, name: str, file: str = "config.json") -> Json:
        if name not in self.classes:
            raise ValueError(f"{self.path} names no {name}")
        content = Json(self.folder / name / file)
        content.class_name = self.classes[name]
        return content

    def tokenizer(self, name: str, max_length: int) -> dict[str, Any]:
        if name not in self.classes:
            raise ValueError(f"{self.path} names no {name}")
        return read_tokenizer(self.folder / name, self.classes[name], max_length)


# What a pipeline's UNet takes beside its latents.
CONCATENATED = {
    "StableDiffusionDepth2ImgPipeline": "depth",
    "StableDiffusionUpscalePipeline": "low_resolution",
}


def _clip(pipeline: _Pipeline, component: str, xl: bool) -> dict[str, Any]:
    projection = pipeline.classes[component] == "CLIPTextModelWithProjection"
    content = pipeline.json(component)
    network = clip_from(content, projection)
    tokens = component.replace("text_encoder", "tokenizer")
    section = dict(kind="clip", dropout=0.1) | pipeline.tokenizer(tokens, network["max_length"])
    if section.get("tokenizer") != "sentencepiece":  # which is an extra
        _check_vocabulary(content, make_tokenizer(section, network["max_length"]).size, network)
    if xl:
        network |= dict(layer="penultimate", final_norm=False)
        zeros = pipeline.options.get("force_zeros_for_empty_prompt", True)
        section |= dict(zero_null=True) if zeros else {}
    return section | dict(network=network)


def _bert(pipeline: _Pipeline) -> dict[str, Any]:
    content = pipeline.json("bert")
    network = bert_from(content)
    section = dict(kind="text", dropout=0.1)
    section |= pipeline.tokenizer("tokenizer", network["max_length"])
    size = make_tokenizer(section, network["max_length"]).size
    if size != network.pop("vocab_size"):
        raise ValueError(f"{content.path}: vocab_size is not {size}, the tokenizer's")
    return section | dict(network=network)


def _check_vocabulary(content: Json, size: int, network: dict[str, Any]) -> None:
    if size > network["vocab_size"]:
        found = network["vocab_size"]
        raise ValueError(f"{content.path}: vocab_size={found}, but the tokenizer has {size} pieces")


def _conditioning(
    pipeline: _Pipeline, unet: dict[str, Any], vector: str, latents: int
) -> dict[str, Any]:
    """The sections of the text encoders, and of what the UNet takes beside them."""
    xl = unet.get("num_classes") == "sequential" and vector == "add_embedding"
    sections: dict[str, Any] = {}
    if "bert" in pipeline.classes:
        sections["text"] = _bert(pipeline)
    for name, component in ENCODER_OF.items():
        if component in pipeline.classes:
            sections[name] = _clip(pipeline, component, xl)
    widths = [section["network"]["width"] for section in sections.values()]
    if sum(widths) != unet.get("context_dim", 0):
        raise ValueError(
            f"{pipeline.folder}/unet/config.json: cross_attention_dim={unet.get('context_dim')}, "
            f"but the text encoders {list(sections)} are {widths} wide"
        )
    if xl:
        if not sections:
            raise ValueError(
                f"{pipeline.path} names no text encoder, whose pooled text the UNet takes"
            )
        sections[list(sections)[-1]]["pooled"] = True
        aesthetic = pipeline.options.get("requires_aesthetics_score", False)
        fields = ["original_size", "crop", "aesthetic_score" if aesthetic else "target_size"]
        sections["sizes"] = dict(kind="sizes", fields=fields, dropout=0.0)
        network = sections[list(sections)[-2]]["network"]
        pooled = network["projection"] or network["width"]
        if unet["adm_in_channels"] != pooled + 256 * (5 if aesthetic else 6):
            raise ValueError(
                f"{pipeline.folder}/unet/config.json: projection_class_embeddings_input_dim="
                f"{unet['adm_in_channels']}, but the pooled text has {pooled} and {fields} 256 for "
                "each number"
            )
    elif unet.get("num_classes") == "sequential":
        sections["image_embedding"] = array("vector", unet["adm_in_channels"], dropout=0.25)
    beside = concat_sections(unet["in_channels"], latents)
    name = CONCATENATED.get(pipeline.name, "concat")
    if unet.get("num_classes") not in (None, "sequential"):
        label = "noise_level" if name == "low_resolution" else "label"
        shape = [1] if unet["num_classes"] == "continuous" else []
        sections[label] = array("vector", *shape)
    if "concat" in beside:
        beside = {name: beside["concat"]}
    return sections | beside


def _read_network(folder: Path, network: str, fields: dict[str, Any], dtype: Any):
    stem = "model" if network in ("clip", "bert") else WEIGHTS
    state = open_shards(folder, stem)
    return read_params(state, slots(network, fields, "diffusers"), dtype=dtype)


def read(folder: str | os.PathLike, dtype: Any = "float32") -> Imported:
    """The model in a folder with a `model_index.json`.

    How it was sampled is left to the caller, but for the grid of timesteps and where it ends.

    Raises:
      FileNotFoundError: a file of a component is missing.
      ValueError: a component of a class, or a value in a JSON, that we do not know, with file, key
        and value; and as `open_shards`.
    """
    pipeline = _Pipeline(Path(folder))
    unet, size, vector = unet_from(pipeline.json("unet"))
    stage = "vqvae" if "vqvae" in pipeline.classes else "vae"
    autoencoder = autoencoder_from(pipeline.json(stage))
    tiny = autoencoder["kind"] == "tiny"
    levels = len(autoencoder["encoder_blocks" if tiny else "ch_mult"])
    latents = autoencoder["latent_channels" if tiny else "embed_dim"]
    sections = _conditioning(pipeline, unet, vector, latents)
    xl = "sizes" in sections
    stable = "text_encoder" in pipeline.classes and not xl
    scheduler = pipeline.json("scheduler", "scheduler_config.json")
    guidance = (5.0 if xl or "bert" in pipeline.classes else 7.5) if sections else 1.0
    config = dict(
        task="diffusion",
        image_size=size * 2 ** (levels - 1),
        unet=unet,
        autoencoder=autoencoder,
        conditioning=sections,
        diffusion=diffusion_from(scheduler, stable),
        sampling=dict(sampler="ddim", steps=50, guidance=guidance, eta=0.0),
    )
    params, reports = {}, {}
    for name, (component, network, fields) in networks(config, stage).items():
        place = pipeline.folder / component
        params[name], reports[name] = _read_network(place, network, fields, dtype)
    about = f"{pipeline.name} of diffusers: " + ", ".join(
        f"{name} ({cls})" for name, cls in pipeline.classes.items() if name not in PASSED_OVER
    )
    return Imported(config, params, about, reports)


def read_component(folder: str | os.PathLike, dtype: Any = "float32") -> Imported:
    """An autoencoder alone (task "autoencoder") or a UNet alone (task "unet"), from its folder.

    Raises as `read`.
    """
    folder = Path(folder)
    content = Json(folder / "config.json")
    name = content.class_name
    if name in AUTOENCODERS:
        task, fields = "autoencoder", autoencoder_from(content)
    elif name in UNETS:
        task, fields = "unet", unet_from(content)[0]
    else:
        known = ", ".join((*AUTOENCODERS, *UNETS))
        raise ValueError(
            f"{content.path}: _class_name={name!r} is not supported: known are {known}"
        )
    params, report = _read_network(folder, task, fields, dtype)
    config = {"task": task, task: fields}
    return Imported(config, {task: params}, f"{name} of diffusers", {task: report})
