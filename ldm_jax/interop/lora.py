"""Low-rank adaptations (Hu et al. 2021) from other people's files: W + scale·(alpha/rank)·up·down.

Read are LoRAs of UNets and CLIP text encoders, on matrices and on convolutions, as kohya's scripts
write them (`lora_unet_….lora_down.weight`, after diffusers' names or, for SDXL, CompVis') and as
peft and diffusers do (`unet.….lora_A.weight`, and two older spellings). Layers are looked up by
their names with every dot an underscore, in which all of these agree.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.interop import names
from ldm_jax.interop.files import Tensors, open_state
from ldm_jax.interop.layout import VECTORS, shapes
from ldm_jax.models.unet import UNet


class Factors(NamedTuple):
    """A change of one kernel (…, in, out) is `down` (…, in, rank) times `up` (rank, out)."""

    down: np.ndarray
    up: np.ndarray


Lora = dict[str, Factors]  # by path, "unet/input_blocks_1_1/proj_in/kernel"; alpha is in `up`

# Networks by what their layers' names begin with. Names without any of these are a UNet's.
PREFIXES = (
    (r"lora_unet_|unet\.|(model\.)?diffusion_model\.", "unet"),
    (r"lora_te2_|text_encoder_2\.", "text_2"),
    (r"lora_te1?_|text_encoder\.", "text"),
)
PART = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|A|B)(?:\.\w+)?\.weight")
ALPHA = re.compile(r"(.+?)(?:[._]lora)?\.alpha")
PARTS = {"A": "down", "B": "up"}
# What else files hold that changes layers, by something in their keys.
OTHER_METHODS = {
    "DoRA": r"\.dora_scale$|lora_magnitude_vector",
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "LoCon with a middle factor": r"\.lora_mid\.",
    "OFT": r"\.oft_",
    "IA3": r"\.on_input$",
    "a change that is not of low rank": r"\.diff(_b)?$",
    "LoRA with biases": r"lora_B\.(\w+\.)?bias$",
}
# By the width of what a UNet cross-attends to.
FAMILIES = {
    768: "Stable Diffusion 1",
    1024: "Stable Diffusion 2",
    2048: "SDXL",
    1280: "SDXL's refiner or LDM's text-to-image",
}
TRANSFORMERS = r"transformer\.|lora_transformer_|.*(double|single|joint)_blocks"

Layer = tuple[str, str]  # network and name


class Found(NamedTuple):
    """What a file has of a layer: `name` as it is there, and keys by "down", "up", "alpha"."""

    name: str
    keys: dict[str, str]


def read_lora(
    path: str | os.PathLike, config: dict[str, Any], alphas: Mapping[str, float] | None = None
) -> Lora:
    """The LoRA in a file, or in a folder that diffusers wrote, for the model of `config`.

    Args:
      config: of the model; its sections `unet` and, of `conditioning`, those of kind "clip" count:
        "text" as diffusers' text_encoder, "text_2" as its text_encoder_2.
      alphas: by layer, as the file names it, if they are kept apart (diffusers' network_alphas).
        A layer of which alpha is given nowhere has its rank for alpha.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no LoRA, another method, NaN, or names or shapes that are not this model's. Says
        file and key.
    """
    if "unet" not in config:
        raise ValueError(f"{path}: a LoRA is for a model with a UNet, and this one has none")
    path = _weights(Path(path).expanduser())
    state = open_state(path)
    for method, pattern in OTHER_METHODS.items():
        key = next((key for key in state if re.search(pattern, key)), None)
        if key:
            raise ValueError(f"{path} holds {method}, and only plain LoRA can be read: {key}")
    layers, rest = _layers(state)
    if not layers:
        raise ValueError(f"{path} holds no LoRA: its {len(state)} keys are {_some(list(state))}")
    if rest:
        raise ValueError(f"{path}: {len(rest)} keys are part of no LoRA: {_some(rest)}")
    targets = _targets(config)
    odd = [found.name for layer, found in layers.items() if layer not in targets]
    if odd:
        raise ValueError(
            f"{path} is a LoRA for another model: {len(odd)} of its {len(layers)} layers are not "
            f"in this one, {_some(odd)}. {_compared(state, layers, config)}"
        )

    for layer, found in layers.items():
        wrong = _wrong_shape(state, found, *targets[layer])
        if wrong:
            raise ValueError(f"{wrong}. {_compared(state, layers, config)}")

    given = _header_alphas(path, state, layers)
    given |= {_layer(name): float(alpha) for name, alpha in (alphas or {}).items()}
    lora: Lora = {}
    for layer, found in layers.items():
        leaf, shape = targets[layer]
        if leaf in lora:
            raise ValueError(f"{path} changes {leaf} twice, the second time as {found.name}")
        lora[leaf] = _factors(state, found, shape, given.get(layer))
    return lora


def merge(params: dict[str, Any], lora: Lora, scale: float | jax.Array = 1.0) -> dict[str, Any]:
    """`params` with scale·(alpha/rank)·up·down added to each kernel that `lora` changes.

    The sum is computed in float32 and has the kernel's type. Pure, and `scale` may be traced, so
    merging inside of a jitted function keeps the LoRA apart, its strength free.

    Raises ValueError for a kernel that `params` lacks or that has another shape.
    """
    flat = flatten_dict(params, sep="/", keep_empty_nodes=True)
    for path, (down, up) in lora.items():
        expected = (*down.shape[:-1], up.shape[-1])
        found = getattr(flat.get(path), "shape", None)
        if found != expected:
            raise ValueError(f"the LoRA changes {path} of shape {expected}, which here is {found}")
        delta = jnp.matmul(down, up, precision="highest", preferred_element_type=jnp.float32)
        kernel = jnp.asarray(flat[path])
        flat[path] = (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)
    return unflatten_dict(flat, sep="/")


def _weights(path: Path) -> Path:
    if not path.is_dir():
        return path
    candidates = [path / f"pytorch_lora_weights.{suffix}" for suffix in ("safetensors", "bin")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"no LoRA in {path}: looked for {', '.join(map(str, candidates))}")


def _layers(state: Tensors) -> tuple[dict[Layer, Found], list[str]]:
    """What the file has of each layer, and the keys that are part of none."""
    layers, rest, alphas = {}, [], []
    for key in state:
        if match := PART.fullmatch(key):
            found = layers.setdefault(_layer(match[1]), Found(match[1], {}))
            part = PARTS.get(match[2], match[2])
            if part in found.keys:
                raise ValueError(f"{state.place(key)} is there as {found.keys[part]} already")
            found.keys[part] = key
        elif match := ALPHA.fullmatch(key):
            alphas.append((_layer(match[1]), key))
        else:
            rest.append(key)
    for layer, key in alphas:
        if layer in layers:
            layers[layer].keys["alpha"] = key
        else:
            rest.append(key)
    return layers, rest


def _layer(name: str) -> Layer:
    """(network, name with underscores) of a layer, in whatever way its file names it."""
    name, network = name.removeprefix("base_model.model."), "unet"
    for prefix, marked in PREFIXES:
        if match := re.match(prefix, name):
            network, name = marked, name[match.end() :]
            break
    name = name.replace(".", "_").replace("_processor_", "_")
    if network == "unet":
        return network, re.sub(r"_to_out$", "_to_out_0", name)
    # Older files name a text encoder's attention like a UNet's.
    name = re.sub(r"_self_attn_to_(q|k|v|out)$", r"_self_attn_\1_proj", name)
    return network, name.removeprefix("text_model_")


def _targets(config: dict[str, Any]) -> dict[Layer, tuple[str, tuple[int, ...]]]:
    """Path and shape of the kernel that the LoRA of a layer changes."""
    targets = {}
    blocks = config["unet"].get("num_res_blocks", UNet.num_res_blocks)
    for path, shape in _kernels("unet", config["unet"]):
        compvis = names.compvis_name("unet", path)
        diffusers = (names.diffusers_unet_name(compvis, blocks, vector=v) for v in VECTORS)
        for name in (compvis, *diffusers):
            targets[_layer(name.removesuffix(".weight"))] = f"unet/{path}", shape
    for section, fields in config.get("conditioning", {}).items():
        if fields["kind"] == "clip":
            for path, shape in _kernels("clip", fields["network"]):
                _, name = _layer("text_encoder." + names.clip_name(path).removesuffix(".weight"))
                targets[section, name] = f"{section}/{path}", shape
    return targets


def _kernels(network: str, fields: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    return [(p, shape) for p, shape in shapes(network, fields).items() if p.endswith("/kernel")]


def _header_alphas(path: Path, state: Tensors, layers: dict[Layer, Found]) -> dict[Layer, float]:
    """alphas from peft's configuration, which diffusers keeps in the header of what it writes."""
    try:
        about = json.loads(state.metadata.get("lora_adapter_metadata", "{}"))
        alphas = {
            layer: _peft_alpha(about, found.name, state.shape(found.keys["down"])[0])
            for layer, found in layers.items()
        }
    except (ValueError, AttributeError, TypeError, re.error) as error:
        raise ValueError(f"{path}: lora_adapter_metadata in the header: {error!r}") from error
    return {layer: alpha for layer, alpha in alphas.items() if alpha is not None}


def _peft_alpha(about: dict[str, Any], name: str, rank: int) -> float | None:
    network, _, name = name.partition(".")
    alpha = about.get(f"{network}.lora_alpha")
    for pattern, special in (about.get(f"{network}.alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = special
            break
    if alpha is None:
        return None
    # W + (alpha/√rank)·up·down, "rank-stabilised" (Kalajdzievski 2023).
    return float(alpha) * (math.sqrt(rank) if about.get(f"{network}.use_rslora") else 1.0)


def _wrong_shape(state: Tensors, found: Found, leaf: str, shape: tuple[int, ...]) -> str | None:
    """What is wrong with the factors of a kernel of this shape, if anything is."""
    *space, inputs, outputs = shape
    for part, other in (("down", "up"), ("up", "down")):
        if part not in found.keys:
            return f"{state.place(found.keys[other])} has no {part!r} beside it"
    alpha = found.keys.get("alpha")
    if alpha and math.prod(state.shape(alpha)) != 1:
        return f"{state.place(alpha)} has shape {list(state.shape(alpha))}, but should be a number"
    rank = max([1, *state.shape(found.keys["down"])[:1]])
    for part, expected in (("down", (rank, inputs, *space)), ("up", (outputs, rank))):
        came = state.shape(found.keys[part])
        if _bare(came) != _bare(expected):
            key = state.place(found.keys[part])
            return f"{key} has shape {list(came)}, but {leaf} here needs {list(expected)}"
    return None


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the 1s of a 1×1 convolution."""
    return shape[:2] if set(shape[2:]) <= {1} else shape


def _factors(state: Tensors, found: Found, shape: tuple[int, ...], alpha: float | None) -> Factors:
    tensors = {part: state[key].astype(np.float32) for part, key in found.keys.items()}
    for part, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"{state.place(found.keys[part])} holds NaN or infinity")
    rank = len(tensors["down"])
    if "alpha" in tensors:
        alpha = tensors["alpha"].item()
    scale = 1.0 if alpha is None else alpha / rank
    down = names.to_flax(tensors["down"].reshape(rank, shape[-2], *shape[:-2]), (*shape[:-1], rank))
    return Factors(down, tensors["up"].reshape(shape[-1], rank).T * np.float32(scale))


def _compared(state: Tensors, layers: dict[Layer, Found], config: dict[str, Any]) -> str:
    """For which kind of model this LoRA may be, and of which kind this one is."""
    theirs = state.metadata.get("ss_base_model_version") or "something else"
    for (network, name), found in layers.items():
        if re.match(TRANSFORMERS, found.name):
            theirs = "a transformer, such as those of FLUX and Stable Diffusion 3"
        if network == "unet" and name.endswith("attn2_to_k") and "down" in found.keys:
            for width in state.shape(found.keys["down"])[1:2]:
                theirs = FAMILIES.get(width, f"one with context_dim={width}")
    width = config["unet"].get("context_dim")
    ours = FAMILIES.get(width, f"one with context_dim={width}")
    return f"It seems to be for {theirs}; this model is {ours}"


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return ", ".join(keys[:4]) + more
