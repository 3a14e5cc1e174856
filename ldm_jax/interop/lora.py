"""Reading of changes of a model's kernels: LoRA, LoHa, LoKr, LoCon and DoRA.

They are for UNets and CLIP text encoders, matrices and convolutions, in the formats of kohya's
scripts and LyCORIS (`lora_unet_….lora_down.weight`, after diffusers' names or, for SDXL, CompVis')
and of peft and diffusers (`unet.….lora_A.weight`, and two older spellings). Layers are found by
their names with underscores for dots, which are the same in all of these.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.interop import names
from ldm_jax.interop.changes import (
    Change,
    Decomposed,
    Factors,
    Hadamard,
    Kronecker,
    Lora,
    delta,
)
from ldm_jax.interop.files import Tensors, open_state
from ldm_jax.interop.layout import VECTORS, shapes
from ldm_jax.interop.networks import networks
from ldm_jax.models.unet import UNet

# Networks by the prefix of their layers' names. Names without a prefix are a UNet's.
PREFIXES = (
    (r"lora_unet_|unet\.|(model\.)?diffusion_model\.", "unet"),
    (r"lora_te2_|text_encoder_2\.", "text_2"),
    (r"lora_te1?_|text_encoder\.", "text"),
)
PART = re.compile(
    r"(.+?)(?:[._]lora(?:_linear_layer)?[._](down|up|mid|A|B)(?:\.\w+)?\.weight"
    r"|\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|dora_scale)(?:\.\w+)*"
    r"|[._](lora_magnitude_vector)(?:\.\w+)*|(?:[._]lora)?\.(alpha))"
)
PARTS = {"A": "down", "B": "up"}
# Other methods that change layers, by a pattern of their keys.
OTHER_METHODS = {
    "OFT": r"\.b?oft_",
    "IA3": r"\.on_input$|\.ia3_l",
    "GLoRA": r"\.[ab][12]\.weight$",
    "norms": r"\.[wb]_norm$",
    "a change that is not of low rank": r"\.diff(_b)?$",
    "LoRA with biases": r"lora_B\.(\w+\.)?bias$",
}
# By the width of a UNet's context.
FAMILIES = {
    768: "Stable Diffusion 1",
    1024: "Stable Diffusion 2",
    2048: "SDXL",
    1280: "SDXL's refiner or LDM's text-to-image",
}
TRANSFORMERS = r"transformer\.|lora_transformer_|.*(double|single|joint)_blocks"

Layer = tuple[str, str]  # network and name


class Found(NamedTuple):
    """A layer in a file: its `name` there, and its keys by "down", "up", "alpha"."""

    name: str
    keys: dict[str, str]


def read_lora(
    path: str | os.PathLike, config: dict[str, Any], alphas: Mapping[str, float] | None = None
) -> Lora:
    """The LoRA in a file, a run's workdir, or a folder of diffusers, for the model of `config`.

    Args:
      config: of the model; its sections `unet` and, of `conditioning`, those of text encoders:
        "text" as diffusers' text_encoder, "text_2" as its text_encoder_2.
      alphas: by layer, as named in the file, if they are separate (diffusers' network_alphas). The
        default alpha of a layer is its rank.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no LoRA, another method, NaN, or names or shapes that are not this model's. Names
        file and key.
    """
    if "unet" not in config:
        raise ValueError(f"{path}: a LoRA is for a model with a UNet, and this one has none")
    path = _weights(Path(path).expanduser())
    state = open_state(path)
    for method, pattern in OTHER_METHODS.items():
        key = next((key for key in state if re.search(pattern, key)), None)
        if key:
            raise ValueError(
                f"{path} holds {method}, and LoRA, LoHa, LoKr and DoRA can be read: {key}"
            )
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

    given = _header_alphas(path, state, layers)
    given |= {_layer(name): float(alpha) for name, alpha in (alphas or {}).items()}
    lora: Lora = {}
    for layer, found in layers.items():
        leaf, shape = targets[layer]
        if leaf in lora:
            raise ValueError(f"{path} changes {leaf} twice, the second time as {found.name}")
        parts = _parts(state, found)
        try:
            change = _change(parts, shape[:-2], given.get(layer))
        except KeyError as error:
            have = " and ".join(parts)
            raise ValueError(f"{path}: {found.name} has {have}, and no {error} beside it") from None
        except ValueError:
            change = None
        if change is None or not _fits(change, shape):
            came = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
            raise ValueError(
                f"{path}: {found.name}: {came} do not change {leaf}, which here is "
                f"{[*shape[:-3:-1], *shape[:-2]]}. {_compared(state, layers, config)}"
            )
        lora[leaf] = change
    return lora


def _weights(path: Path) -> Path:
    if not path.is_dir():
        return path
    called = ("lora.safetensors", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
    candidates = [path / name for name in called]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"no LoRA in {path}: looked for {', '.join(map(str, candidates))}")


def _layers(state: Tensors) -> tuple[dict[Layer, Found], list[str]]:
    """The layers in the file, and the keys that belong to none."""
    layers: dict[Layer, Found] = {}
    rest = []
    for key in state:
        match = PART.fullmatch(key)
        if not match:
            rest.append(key)
            continue
        found = layers.setdefault(_layer(match[1]), Found(match[1], {}))
        part = next(filter(None, match.groups()[1:]))
        part = PARTS.get(part, part)
        if part in found.keys:
            raise ValueError(f"{state.place(key)} is there as {found.keys[part]} already")
        found.keys[part] = key
    alone = [layer for layer, found in layers.items() if found.keys.keys() == {"alpha"}]
    return layers, rest + [layers.pop(layer).keys["alpha"] for layer in alone]


def _layer(name: str) -> Layer:
    """(network, name with underscores) of a layer, from its name in any format."""
    name, network = name.removeprefix("base_model.model."), "unet"
    for prefix, marked in PREFIXES:
        if match := re.match(prefix, name):
            network, name = marked, name[match.end() :]
            break
    name = name.replace(".", "_").replace("_processor_", "_")
    if network == "unet":
        return network, re.sub(r"_to_out$", "_to_out_0", name)
    # Older files name the attention of text encoders like that of UNets.
    name = re.sub(r"_self_attn_to_(q|k|v|out)$", r"_self_attn_\1_proj", name)
    return network, name.removeprefix("text_model_")


def _targets(config: dict[str, Any]) -> dict[Layer, tuple[str, tuple[int, ...]]]:
    """Path and shape of the kernel that the LoRA of a layer changes."""
    targets = {}
    blocks = config["unet"].get("num_res_blocks", UNet.num_res_blocks)
    for section, (network, fields) in networks(config).items():
        if network not in ("unet", "clip", "bert"):
            continue
        for path, shape in shapes(network, fields).items():
            if not path.endswith("/kernel"):
                continue
            prefix, called = "text_encoder.", [names.name_of(network, path)]
            if network == "unet":
                name = names.name_of("unet", path)
                diffusers = (names.diffusers_unet_name(name, blocks, vector=v) for v in VECTORS)
                prefix, called = "unet.", [name, *diffusers]
            for name in called:
                layer = section, _layer(prefix + name.removesuffix(".weight"))[1]
                targets[layer] = f"{section}/{path}", shape
    return targets


def _header_alphas(path: Path, state: Tensors, layers: dict[Layer, Found]) -> dict[Layer, float]:
    """alphas from peft's configuration, which diffusers writes into a file's header."""
    try:
        about = json.loads(state.metadata.get("lora_adapter_metadata", "{}"))
        alphas = {
            layer: _peft_alpha(about, found.name, state.shape(found.keys["down"])[0])
            for layer, found in layers.items()
            if "down" in found.keys
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


def _parts(state: Tensors, found: Found) -> dict[str, np.ndarray]:
    """The tensors of a layer, in torch's layout. Raises ValueError for NaN or infinity."""
    parts = {part: state[key].astype(np.float32) for part, key in found.keys.items()}
    for part, tensor in parts.items():
        place = state.place(found.keys[part])
        if not np.isfinite(tensor).all():
            raise ValueError(f"{place} holds NaN or infinity")
        if part == "alpha" and tensor.size != 1:
            raise ValueError(f"{place} has shape {list(tensor.shape)}, but should be a number")
    return parts


def _low_rank(up: np.ndarray, down: np.ndarray, core: np.ndarray | None, space: tuple) -> Factors:
    """From torch's (out, rank) and (rank, in, …), with a `core` (rank, rank, …) between them."""
    if core is not None:
        down = np.einsum("ij...,jk->ik...", core, down.reshape(down.shape[:2]))
    down, up = down.reshape(len(down), -1, *space), up.reshape(up.shape[:2])
    if len(down) != up.shape[1]:
        raise ValueError(f"ranks {len(down)} and {up.shape[1]}")
    return Factors(np.moveaxis(down, (0, 1), (-1, -2)), up.T)


def _change(parts: dict[str, np.ndarray], space: tuple[int, ...], alpha: float | None) -> Change:
    """The change that a layer's parts make, for a kernel with these windows.

    Raises KeyError for a missing part, ValueError for shapes that do not fit each other.
    """
    if "alpha" in parts:
        alpha = parts["alpha"].item()
    # If no factor has a rank, LyCORIS ignores alpha.
    ranked = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    rank = next((len(parts[part]) for part in ranked if part in parts), None)
    scale = np.float32(1.0 if None in (alpha, rank) else alpha / max(rank, 1))

    def side(name: str, space: tuple[int, ...]) -> Factors:
        core = parts.get(name.replace("w", "t"))
        up = parts[f"{name}_a"] if core is None else parts[f"{name}_a"].T
        return _low_rank(up, parts[f"{name}_b"], core, space)

    def whole(name: str, space: tuple[int, ...]) -> np.ndarray:
        if name not in parts:
            return np.matmul(*side(name, space))
        given = parts[name]
        return np.moveaxis(given.reshape(*given.shape[:2], *space), (0, 1), (-1, -2))

    kinds = {part[:4] for part in parts} & {"hada", "lokr", "down"}
    if len(kinds) > 1:
        raise ValueError(f"a layer is changed in one way, not in {len(kinds)}")
    if kinds == {"hada"}:
        first, second = side("hada_w1", space), side("hada_w2", space)
        change: Change = Hadamard(first._replace(up=scale * first.up), second)
    elif kinds == {"lokr"}:
        change = Kronecker(scale * whole("lokr_w1", ()), whole("lokr_w2", space))
    else:
        factors = _low_rank(parts["up"], parts["down"], parts.get("mid"), space)
        change = factors._replace(up=scale * factors.up)
    return _decomposed(change, parts, len(space))


def _fits(change: Change, shape: tuple[int, ...]) -> bool:
    """Whether a change and its norms fit a kernel of that shape."""
    norms = change.magnitude.shape if isinstance(change, Decomposed) else [1] * len(shape)
    alike = all(n in (1, m) for n, m in zip(norms, shape, strict=True))
    return alike and jax.eval_shape(delta, change).shape == shape


def _decomposed(change: Change, parts: dict[str, np.ndarray], space: int) -> Change:
    """The change with the layer's norms, if any: peft's are of outputs, LyCORIS' of either side."""
    norms = parts.get("lora_magnitude_vector", parts.get("dora_scale"))
    if norms is None:
        return change
    if norms.size != max(norms.shape, default=0):
        raise ValueError(f"norms of shape {norms.shape}, where a vector was expected")
    of_inputs = "dora_scale" in parts and norms.ndim > 1 and len(norms) == 1
    shape = (-1, 1) if of_inputs else (1, -1)
    return Decomposed(change, norms.reshape(*[1] * space, *shape))


def _compared(state: Tensors, layers: dict[Layer, Found], config: dict[str, Any]) -> str:
    """A sentence on the kinds of model of the LoRA and of this model."""
    theirs = state.metadata.get("ss_base_model_version")
    for (network, name), found in layers.items():
        if re.match(TRANSFORMERS, found.name):
            theirs = "a transformer, such as those of FLUX and Stable Diffusion 3"
        key = found.keys.get("down") or found.keys.get("hada_w1_b")
        if network == "unet" and name.endswith("attn2_to_k") and key:
            for width in state.shape(key)[1:2]:
                theirs = FAMILIES.get(width, f"one with context_dim={width}")
    width = config["unet"].get("context_dim")
    ours = FAMILIES.get(width, f"one with context_dim={width}")
    return f"It seems to be for {theirs}; this model is {ours}" if theirs else f"This is {ours}"


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return ", ".join(keys[:4]) + more
