"""Writing of trained LoRAs, in kohya's format and in that of peft and diffusers.

Layers have the names that `read_lora` finds, and factors the shapes of torch's layers.
"""

import json
import os
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from ldm_jax.interop import names
from ldm_jax.interop.changes import stored_alpha
from ldm_jax.interop.files import write_safetensors
from ldm_jax.interop.layout import slots
from ldm_jax.interop.networks import networks
from ldm_jax.models.low_rank import DOWN, MAGNITUDE, UP
from ldm_jax.models.unet import UNet
from ldm_jax.version import __version__

# Of the names of a network's layers: kohya's with one text encoder, with two; peft's.
PREFIXES = {
    "unet": ("lora_unet_", "lora_unet_", "unet."),
    "text": ("lora_te_", "lora_te1_", "text_encoder."),
    "text_2": ("lora_te2_", "lora_te2_", "text_encoder_2."),
}
LAYOUTS = {  # the names of a layer's tensors
    "kohya": ("{}.lora_down.weight", "{}.lora_up.weight", "{}.dora_scale"),
    "peft": ("{}.lora_A.weight", "{}.lora_B.weight", "{}.lora_magnitude_vector"),
}
# kohya's name of the kind of model, by the width of a UNet's context.
VERSIONS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}


def write_lora(
    path: str | os.PathLike,
    factors: dict[str, Any],
    config: dict[str, Any],
    alpha: float,
    rslora: bool = False,
    layout: str = "kohya",
) -> None:
    """Writes the factors beside the kernels of a model (`models.low_rank`), float32 and unchanged.

    The file appears whole or not at all. alpha is a tensor of each layer in kohya's format, and in
    peft's a number in the header, which older versions of diffusers do not read. DoRA's norms in
    kohya's format are as LyCORIS writes them, and diffusers leaves those out.

    Args:
      factors: by network; other parameters in it are left out.
      config: of the model.
      alpha: the change is alpha/rank·down·up; with `rslora` alpha/√rank·down·up.
      layout: one of `LAYOUTS`.

    Raises ValueError for an unknown layout, or a kernel that has no name in it.
    """
    flat = flatten_dict(factors, sep="/")
    layers = {path.removesuffix(DOWN): None for path in flat if path.endswith(f"/{DOWN}")}
    called = layer_names(config, [f"{layer}kernel" for layer in layers], layout)
    keys, tensors = LAYOUTS[layout], {}
    about: dict[str, dict[str, Any]] = {}
    for layer in layers:
        name, dimensions = called[f"{layer}kernel"]
        down, up = (np.asarray(flat[layer + part], np.float32) for part in (DOWN, UP))
        rank, ones = down.shape[-1], (1,) * (dimensions - 2)
        tensors[keys[0].format(name)] = names.to_torch(down, dimensions)
        tensors[keys[1].format(name)] = names.to_torch(up, dimensions)
        dora = (norms := flat.get(layer + MAGNITUDE)) is not None
        if dora:
            norms = np.asarray(norms, np.float32)
            # LyCORIS' are columns; peft's are vectors, of convolutions with 1s around.
            shape = (-1, 1, *ones) if layout == "kohya" else (1, -1, *ones) if ones else (-1,)
            tensors[keys[2].format(name)] = norms.reshape(shape)
        if layout == "kohya":
            tensors[f"{name}.alpha"] = np.asarray(stored_alpha(alpha, rank, rslora))
        else:
            network, _, module = name.partition(".")
            options = dict(r=rank, lora_alpha=alpha, use_rslora=rslora, use_dora=dora)
            about.setdefault(network, options | dict(target_modules=[]))
            # transformers 5 omits "text_model.", and peft finds modules by the ends of their names.
            about[network]["target_modules"].append(module.removeprefix("text_model."))
    header = {"format": "pt", "software": f"ldm_jax {__version__}"}
    if layout == "peft":
        fields = {f"{n}.{key}": value for n, part in about.items() for key, value in part.items()}
        header["lora_adapter_metadata"] = json.dumps(fields)
    else:
        header |= dict(ss_network_module="networks.lora", ss_network_alpha=str(alpha))
        header |= dict(ss_network_dim=str(next(iter(flat[f"{x}{UP}"].shape[0] for x in layers))))
        if version := VERSIONS.get(config["unet"].get("context_dim")):
            header["ss_base_model_version"] = version
    write_safetensors(path, tensors, header)


def layer_names(
    config: dict[str, Any], kernels: list[str], layout: str
) -> dict[str, tuple[str, int]]:
    """By path of the kernel: the name of a layer in a file, and its dimensions in torch.

    UNets have diffusers' names; in kohya's format, those with SDXL's vector, and those with
    attention without a context, have CompVis' names, as kohya's scripts write them.

    Raises ValueError for an unknown layout, or a kernel that has no name in it.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: choose one of {', '.join(LAYOUTS)}")
    built, wanted = networks(config), {path.partition("/")[0] for path in kernels}
    tables = {}
    for section in wanted:
        network, fields = built[section]
        if section not in PREFIXES:
            raise ValueError(
                f"a LoRA file has no name for the network {section!r}, only for "
                f"{', '.join(PREFIXES)}"
            )
        tables[section] = slots(network, fields, "compvis")
    plain = any("/qkv/" in f"/{path}" for path in tables.get("unet", ()))
    if plain and layout == "peft":
        raise ValueError(
            "layout='peft' has no names for this UNet, whose attention has no context: use 'kohya'"
        )
    unet = config["unet"]
    compvis = layout == "kohya" and (plain or unet.get("num_classes") == "sequential")
    blocks = unet.get("num_res_blocks", UNet.num_res_blocks)
    kinds = {section["kind"] for section in config.get("conditioning", {}).values()}
    vector = "add_embedding" if "sizes" in kinds else "class_embedding"
    style = 2 if layout == "peft" else 1 if "text_2" in built else 0
    found = {}
    for path in kernels:
        section, _, leaf = path.partition("/")
        slot = tables[section][leaf]
        name = slot.names[0]
        if section == "unet" and not compvis:
            name = names.diffusers_unet_name(name, blocks, vector=vector)
        name = name.removesuffix(".weight")
        name = name.replace(".", "_") if layout == "kohya" else name
        found[path] = PREFIXES[section][style] + name, len(slot.foreign)
    return found
