"""Reads our config and parameters from a folder of diffusers."""

import os
from pathlib import Path
from typing import Any

from ldm_jax.conditions.tokenizer import make_tokenizer
from ldm_jax.interop.diffusers.components import (
    AUTOENCODERS,
    ENCODERS,
    Fields,
    Json,
    autoencoder_from,
    load,
    read_fields,
)
from ldm_jax.interop.diffusers.schedulers import SCHEDULERS, diffusion_from, sampling_from
from ldm_jax.interop.diffusers.tokenizers import read_tokenizer
from ldm_jax.interop.diffusers.unets import UNETS, unet_from
from ldm_jax.interop.families import array, concat_sections
from ldm_jax.interop.files import open_shards
from ldm_jax.interop.layout import Imported, read_params, slots
from ldm_jax.interop.networks import networks, texts
from ldm_jax.interop.reports import Report
from ldm_jax.models.build import make_autoencoder

CLIPS = ("CLIPTextModel", "CLIPTextModelWithProjection")
# Component → known classes; tokenizers may be of any class: see `read_tokenizer`.
KNOWN = {
    "unet": tuple(UNETS),
    "vae": tuple(AUTOENCODERS),
    "vqvae": tuple(AUTOENCODERS),
    "text_encoder": CLIPS,
    "text_encoder_2": CLIPS,
    "bert": tuple(ENCODERS),
    "tokenizer": (),
    "tokenizer_2": (),
    "scheduler": tuple(SCHEDULERS),
}
# Components that are not needed to draw, or whose results the caller provides.
PASSED_OVER = (
    *("safety_checker", "feature_extractor", "image_encoder", "watermark", "watermarker"),
    *("depth_estimator", "low_res_scheduler", "image_normalizer", "image_noising_scheduler"),
    *("prior", "prior_tokenizer", "prior_text_encoder", "prior_scheduler"),
)
# Component → the section of `conditioning` that it becomes, and its tokenizer.
TEXTS = {
    "bert": ("text", "tokenizer"),
    "text_encoder": ("text", "tokenizer"),
    "text_encoder_2": ("text_2", "tokenizer_2"),
}
# SDXL's `requires_aesthetics_score` → its size conditioning (Podell et al. 2023, §2.2), in order.
NUMBERS = {
    False: ["original_size", "crop", "target_size"],
    True: ["original_size", "crop", "aesthetic_score"],
}
# Name of the array that is joined to the latents of a pipeline's UNet.
CONCATENATED = {
    "StableDiffusionDepth2ImgPipeline": "depth",
    "StableDiffusionUpscalePipeline": "low_resolution",
}
WEIGHTS = "diffusion_pytorch_model"


class _Pipeline:
    """The `model_index.json` of a folder: its components and their classes.

    `replaced` are components that another model replaces; they may be of any class.
    """

    def __init__(self, folder: Path, replaced: tuple[str, ...]):
        self.folder, self.path = folder, folder / "model_index.json"
        content = load(self.path)
        self.name = content.pop("_class_name", "")
        self.options = {key: v for key, v in content.items() if not isinstance(v, list)}
        listed = {key: v[1] for key, v in content.items() if isinstance(v, list) and any(v)}
        self.classes = {key: name for key, name in listed.items() if key not in PASSED_OVER}
        for name, cls in self.classes.items():
            if name not in KNOWN:
                raise ValueError(
                    f"{self.path}: {name}={cls!r} is no component of a latent diffusion model that "
                    f"we know: {', '.join(KNOWN)}"
                )
            if KNOWN[name] and cls not in KNOWN[name] and name not in replaced:
                raise ValueError(
                    f"{self.path}: {name} is of class {cls!r}: known are {', '.join(KNOWN[name])}"
                )

    def has(self, name: str) -> bool:
        return name in self.classes and (self.folder / name).is_dir()

    def lacks(self, what: str, remedy: str) -> ValueError:
        """The error to raise for a missing part."""
        there = [f"{name} ({cls})" for name, cls in self.classes.items() if self.has(name)]
        return ValueError(f"{self.folder} has {', '.join(there)}, but no {what}: {remedy}")

    def json(self, name: str, file: str = "config.json") -> Json:
        if name not in self.classes:
            raise ValueError(f"{self.path} names no {name}")
        content = Json(self.folder / name / file)
        content.class_name = self.classes[name]
        return content


def _text(pipeline: _Pipeline, component: str) -> Fields:
    """The section of a text encoder and its tokenizer."""
    content, tokens = pipeline.json(component), TEXTS[component][1]
    network = read_fields(content, ENCODERS[content.class_name][1])
    length, size = network["max_length"], network["vocab_size"]
    if tokens not in pipeline.classes:
        raise ValueError(f"{pipeline.path} names no {tokens}: text=PATH takes another model's")
    clip = content.class_name in CLIPS
    section = dict(kind="clip" if clip else "text", dropout=0.1)
    section |= read_tokenizer(pipeline.folder / tokens, pipeline.classes[tokens], length)
    if section.get("tokenizer") != "sentencepiece":  # which is an extra
        pieces = make_tokenizer(section, length).size
        if clip and pieces > size:
            raise ValueError(
                f"{content.path}: vocab_size={size}, but the tokenizer has {pieces} pieces"
            )
        if not clip and pieces != network.pop("vocab_size"):
            raise ValueError(f"{content.path}: vocab_size is not {pieces}, the tokenizer's")
    return section | dict(network=(dict(projection=None) if clip else {}) | network)


def used(xl: bool, last: bool, zeros: bool) -> tuple[Fields, Fields]:
    """The use of a CLIP text encoder in a pipeline: keys of our section, and of its network.

    `last`: it is SDXL's last encoder; `zeros`: its features of no prompt are 0.
    """
    layer = dict(layer="penultimate" if xl else "last", final_norm=not xl)
    return dict(context=True, pooled=xl and last, zero_null=xl and zeros), layer


def _texts(pipeline: _Pipeline, xl: bool) -> Fields:
    there = {name: key for key, (name, _) in TEXTS.items() if pipeline.has(key)}
    sections = {name: _text(pipeline, component) for name, component in there.items()}
    zeros = pipeline.options.get("force_zeros_for_empty_prompt", True)
    for name, section in sections.items():
        if section["kind"] == "clip":
            keys, layer = used(xl, name == [*sections][-1], zeros)
            section["network"] |= layer
            section |= {key: True for key in ("pooled", "zero_null") if keys[key]}
    return sections


def _sizes(pipeline: _Pipeline, text: Fields, vector: int, dim: int) -> Fields:
    """The section of SDXL's sizes; each number has `dim` entries of the vector, after the text."""
    aesthetic = pipeline.options.get("requires_aesthetics_score", False)
    fields = NUMBERS[aesthetic]
    pooled = text["network"].get("projection") or text["network"]["width"]
    if vector != pooled + dim * (5 if aesthetic else 6):
        raise ValueError(
            f"{pipeline.folder}/unet/config.json: projection_class_embeddings_input_dim={vector}, "
            f"but the pooled text has {pooled} and {fields} {dim} for each number"
        )
    section = dict(kind="sizes", fields=[*fields], dropout=0.0)
    return section | ({} if dim == 256 else dict(dim=dim))


def _conditioning(
    pipeline: _Pipeline, unet: Fields, beside: Fields, latents: int, texts: Fields | None
) -> Fields:
    """The conditions: `texts`, or the folder's, and the UNet's other inputs."""
    xl = beside["vector"] == "add_embedding"
    sections = _texts(pipeline, xl) if texts is None else dict(texts)
    widths = [section["network"]["width"] for section in sections.values()]
    width = unet.get("context_dim", 0)
    if width and not sections:
        raise pipeline.lacks(
            f"text encoder, of the width {width} that its UNet attends to",
            "name a model to take it from, text=PATH",
        )
    if sum(widths) != width:
        raise ValueError(
            f"{pipeline.folder}/unet/config.json: cross_attention_dim={width or None}, "
            f"but the text encoders {list(sections)} are {widths} wide; text=PATH takes those of "
            "another model"
        )
    if xl:
        text = sections[list(sections)[-1]]
        dim = beside["addition_time_embed_dim"]
        sections["sizes"] = _sizes(pipeline, text, unet["adm_in_channels"], dim)
    elif unet.get("num_classes") == "sequential":
        sections["image_embedding"] = array("vector", unet["adm_in_channels"], dropout=0.25)
    name = CONCATENATED.get(pipeline.name, "concat")
    if unet.get("num_classes") not in (None, "sequential"):
        label = "noise_level" if name == "low_resolution" else "label"
        shape = [1] if unet["num_classes"] == "continuous" else []
        sections[label] = array("vector", *shape)
    for key, section in concat_sections(unet["in_channels"], latents).items():
        sections[name if key == "concat" else key] = section
    return sections


def _read_network(folder: Path, network: str, fields: Fields, dtype: Any) -> tuple[Any, Report]:
    state = open_shards(folder, "model" if network in ("clip", "bert") else WEIGHTS)
    return read_params(state, slots(network, fields, "diffusers"), dtype=dtype)


def read(
    folder: str | os.PathLike,
    dtype: Any = "float32",
    *,
    autoencoder: Imported | None = None,
    text: Imported | None = None,
) -> Imported:
    """The model in a folder with a `model_index.json`.

    Its scheduler determines the grid, the end of the grid, and the default sampler.

    Args:
      autoencoder, text: models whose autoencoder, or text encoders with their tokenizers, replace
        those of the folder, which may be missing.

    Raises:
      FileNotFoundError: a file of a component is missing.
      ValueError: a missing component, an unknown class, or an unknown value in a JSON, with file,
        key and value; and as `open_shards`.
    """
    replaced = ("vae", "vqvae") if autoencoder else ()
    pipeline = _Pipeline(Path(folder), replaced + (tuple(TEXTS) if text else ()))
    unet, beside = unet_from(pipeline.json("unet"))
    stage = "vqvae" if "vqvae" in pipeline.classes else "vae"
    stage_fields = autoencoder.config["autoencoder"] if autoencoder else {}
    sections = texts(text.config) if text else {}
    if autoencoder is None and not pipeline.has(stage):
        remedy = "name a file or folder to take it from, autoencoder=PATH"
        raise pipeline.lacks(f"autoencoder ({stage})", remedy)
    if pipeline.has(stage) and pipeline.classes[stage] in AUTOENCODERS:
        own = autoencoder_from(pipeline.json(stage))
        # The UNet's latents are those of the folder's own autoencoder.
        kept = {key: own[key] for key in stage_fields.keys() & own.keys() & {"scale_factor"}}
        stage_fields = stage_fields | kept or own
    module = make_autoencoder(stage_fields)
    if autoencoder and module.embed_dim != unet["out_channels"]:
        raise ValueError(
            f"autoencoder={autoencoder.about} has latents of {module.embed_dim} channels, the "
            f"model of {unet['out_channels']}"
        )
    sections = _conditioning(pipeline, unet, beside, module.embed_dim, sections or None)
    xl = "sizes" in sections
    scheduler = pipeline.json("scheduler", "scheduler_config.json")
    stable = "bert" not in pipeline.classes and not xl and "text" in sections
    guidance = (5.0 if xl or "bert" in pipeline.classes else 7.5) if sections else 1.0
    sampling = sampling_from(scheduler) | dict(steps=50, guidance=guidance, eta=0.0)
    if sampling["sampler"] == "lcm":  # the pipeline's own defaults
        sampling |= dict(steps=4, guidance=8.5 if unet.get("time_cond_proj_dim") else 1.0)
    config = dict(
        task="diffusion",
        image_size=beside["sample_size"] * module.downsampling,
        unet=unet,
        autoencoder=stage_fields,
        conditioning=sections,
        diffusion=diffusion_from(scheduler, stable),
        sampling=sampling,
    )
    places = {section: name for name, (section, _) in TEXTS.items() if pipeline.has(name)}
    places |= dict(autoencoder=stage, unet="unet")
    params, reports = {}, {}
    for name, (network, fields) in networks(config).items():
        other = autoencoder if name == "autoencoder" else text if name != "unet" else None
        if other:
            params[name], reports[name] = other.params[name], other.reports.get(name, Report())
        else:
            place = pipeline.folder / places[name]
            params[name], reports[name] = _read_network(place, network, fields, dtype)
    about = ", ".join(f"{name} ({cls})" for name, cls in pipeline.classes.items())
    return Imported(config, params, f"{pipeline.name} of diffusers: {about}", reports)


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
        raise content.error("_class_name", name, f"one of {known}")
    params, report = _read_network(folder, task, fields, dtype)
    config = {"task": task, task: fields}
    return Imported(config, {task: params}, f"{name} of diffusers", {task: report})
