"""The foreign tensors of which each of our leaves is made: one table for reading and writing.

`slots` makes the table for a network and a layout; `read_params` and `write_params` apply it.
Networks: "unet", "autoencoder", "clip", "bert" (LDM's `TextTransformer`), "class", "rescaler".
Layouts: "compvis" (CompVis' code; for CLIP it contains transformers' names, for a tiny autoencoder
TAESD's own), "diffusers", and for CLIP also "openclip".
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.interop import names
from ldm_jax.interop.reports import Report
from ldm_jax.models.build import AUTOENCODERS, make_autoencoder, tuples
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.controlnet import ControlNet
from ldm_jax.models.embedders import ClassEmbedder, Patches, SpatialRescaler
from ldm_jax.models.ip_adapter import make_ip_adapter
from ldm_jax.models.t2i_adapter import T2IAdapter
from ldm_jax.models.text import TextTransformer
from ldm_jax.models.unet import UNet

LAYOUTS = dict.fromkeys(
    ("unet", "autoencoder", "clip", "bert", "class", "rescaler"), ("compvis", "diffusers")
) | {"clip": ("compvis", "diffusers", "openclip")}
# Where diffusers' UNets take a vector in.
VECTORS = ("add_embedding", "class_embedding")
# Tensors that are not parameters of a network: buffers, heads that only training needs, and the
# networks of an autoencoder's loss.
IGNORED = r"(.*\.)?position_ids|to_logits\..*|logit_scale|attn_mask|loss\..*"


@dataclass(frozen=True)
class Slot:
    """One of our leaves and the foreign tensors that hold it.

    Attributes:
      shape: of our leaf.
      names: of the tensors, in order. Slots of the same name share that tensor.
      foreign: shape of each tensor.
      transposed: whether our leaf is a kernel, (…, in, out), and the tensor (out, in, …).
      part: (i, n) where the leaf is the i-th of n equal parts of the tensor, along its first axis.
      heads: if our leaf is `qkv`, whose outputs are ordered head first, then q, k, v, and theirs
        have q, k, v first: one tensor for each, or one for all.
      others: other names of the same tensors in files.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    foreign: tuple[int, ...]
    transposed: bool = False
    part: tuple[int, int] = (0, 1)
    heads: int | None = None
    others: tuple[tuple[str, ...], ...] = ()

    def read(self, *tensors: np.ndarray) -> np.ndarray:
        """Our leaf, a view if possible, from its tensors; shapes must fit (`fits`)."""
        i, n = self.part
        tensor = np.concatenate(tensors) if len(tensors) > 1 else np.split(tensors[0], n)[i]
        if self.heads:
            tensor = _swapped(tensor, 3, self.heads)
        return names.to_flax(tensor, self.shape) if self.transposed else tensor

    def write(self, leaf: np.ndarray) -> list[np.ndarray]:
        """The tensors that hold a leaf; of one that is shared, this leaf's part."""
        tensor = names.to_torch(leaf, len(self.foreign)) if self.transposed else leaf
        if self.heads:
            tensor = _swapped(tensor, self.heads, 3)
        return np.split(tensor, len(self.names))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of that shape can be read: the 1s of a 1×1 kernel are optional."""

        def matrix(shape):
            return shape[:2] if set(shape[2:]) <= {1} else shape

        return matrix(tuple(shape)) == matrix(self.foreign)


def _swapped(tensor: np.ndarray, first: int, second: int) -> np.ndarray:
    """The first axis, of first·second equal parts, in the order second·first."""
    parts = tensor.reshape(first, second, -1, *tensor.shape[1:])
    return parts.swapaxes(0, 1).reshape(tensor.shape)


@dataclass(frozen=True)
class Imported:
    """A model read from a file. `about` describes it for messages."""

    config: dict[str, Any]
    params: dict[str, Any]
    about: str
    reports: dict[str, Report]


def _unet(**fields: Any) -> tuple[nn.Module, list, dict]:
    module = UNet(**fields)
    side = 2 ** (len(module.channel_mult) - 1)
    inputs = [_floats(1, side, side, module.in_channels), _floats(1)]
    if module.context_dim is not None:
        inputs.append(_floats(1, 1, module.context_dim))
    labels = {
        None: None,
        "sequential": _floats(1, module.adm_in_channels or 0),
        "continuous": _floats(1, 1),
        "timestep": _floats(1),
    }
    return module, inputs, {"y": labels.get(module.num_classes, _integers(1))}


def _autoencoder(**fields: Any) -> tuple[nn.Module, list, dict]:
    module = make_autoencoder(fields)
    side = module.downsampling
    return module, [_floats(1, side, side, module.in_channels)], {}


def _control(unet: dict[str, Any], **fields: Any) -> tuple[nn.Module, list, dict]:
    inner, inputs, named = _unet(**tuples(unet))
    module = ControlNet(inner, **fields)
    side = module.factor * inputs[0].shape[1]
    return module, inputs, named | {"hint": _floats(1, side, side, module.hint_in)}


def _rescaler(in_channels: int = 0, kind: str = "", **fields: Any) -> tuple[nn.Module, list, dict]:
    module = SpatialRescaler(**fields)
    if module.out_channels is not None and not in_channels:
        raise ValueError("rescaler with out_channels needs in_channels, of what it is given")
    side = 2**module.n_stages
    return module, [_floats(1, side, side, in_channels)], {}


def _patches(in_channels: int = 0, **fields: Any) -> tuple[nn.Module, list, dict]:
    module = Patches(**fields)
    return module, [_floats(1, module.size, module.size, in_channels)], {}


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


# Network → function of its fields to the module, its inputs and those with names.
_BUILD: dict[str, Callable[..., tuple[nn.Module, list, dict]]] = {
    "unet": _unet,
    "control": _control,
    "ip_adapter": lambda **fields: (
        (net := make_ip_adapter(fields)),
        [_floats(1, net.encoder.side, net.encoder.side, 3)],
        {},
    ),
    "t2i": lambda **fields: ((net := T2IAdapter(**fields)), [_floats(*net.smallest)], {}),
    "autoencoder": _autoencoder,
    "clip": lambda **fields: (CLIPText(**fields), [_integers(1, 1)], {}),
    "bert": lambda kind="", **fields: (TextTransformer(**fields), [_integers(1, 1)], {}),
    "class": lambda **fields: (ClassEmbedder(**fields), [_integers(1)], {}),
    "rescaler": _rescaler,
    "patches": _patches,
}


def shapes(network: str, fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Leaf path ("a/b/kernel") → shape of a network with these fields; nothing is computed."""
    return dict(_shapes(network, json.dumps(fields, sort_keys=True)))


@functools.lru_cache(maxsize=64)  # tracing Stable Diffusion XL's UNet takes seconds
def _shapes(network: str, fields: str) -> dict[str, tuple[int, ...]]:
    try:
        module, inputs, named = _BUILD[network](**tuples(json.loads(fields)))
    except TypeError as error:
        raise ValueError(f"{network}: {error}") from error
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs, **named)
    flat = flatten_dict(variables.get("params", {}), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def _slot(path: str, shape: tuple[int, ...], *called: str, dimensions: int = 0, **more) -> Slot:
    """A leaf of these names; a kernel has as many dimensions there as here, by default."""
    if not path.endswith("/kernel"):
        return Slot(shape, called, shape, **more)
    dimensions = dimensions or len(shape)
    ones = (1,) * (dimensions - len(shape))
    foreign = (shape[-1], shape[-2], *shape[:-2][: dimensions - 2], *ones)
    return Slot(shape, called, foreign, transposed=True, **more)


def _heads(unet: UNet, channels: int, name: str) -> int:
    """The number of heads of attention without a context, from diffusers' name of its tensor."""
    if unet.num_head_channels > 0:
        return channels // unet.num_head_channels
    if isinstance(unet.num_heads, int):
        return unet.num_heads
    place = re.match(r"(down|up)_blocks\.(\d+)", name)
    level = int(place[2]) if place else -1
    return unet.num_heads[~level if place and place[1] == "up" else level]


def _unet_slot(
    fields: dict[str, Any], layout: str, options: dict[str, Any], path: str, shape: tuple
) -> Slot:
    unet = UNet(**fields)
    plain = unet.context_dim is None and not unet.use_spatial_transformer
    name = names.name_of("unet", path)
    layer = path.split("/")[1:-1]  # of an attention module, or of a deeper or another one
    dimensions, heads = 0, None
    if layer in (["qkv"], ["proj_in"], ["proj_out"]):
        matrix = unet.use_linear_in_transformer or plain and layout == "diffusers"
        dimensions = 2 if matrix else 3 if plain else 4
    if layer == ["qkv"] and (layout == "diffusers" or options["new_attention_order"]):
        called_so = names.diffusers_unet_name(name, unet.num_res_blocks, plain)
        heads = _heads(unet, shape[-1] // 3, called_so)
    if layout == "compvis":
        slot = _slot(path, shape, name, dimensions=dimensions, heads=heads)
        if not (options["learn_sigma"] and path.startswith("out_2/")):
            return slot
        return replace(slot, foreign=(2 * slot.foreign[0], *slot.foreign[1:]), part=(0, 2))

    def called(vector):
        return names.diffusers_unet_name(name, unet.num_res_blocks, plain, vector)

    new = called(options["vector"])
    if layer == ["qkv"]:
        three = tuple(new.replace(".qkv.", f".to_{x}.") for x in "qkv")
        old = tuple(names.old_diffusers_name(name) for name in three)
        third = (*shape[:-1], shape[-1] // 3)
        return replace(_slot(path, third, *three, heads=heads, others=(old,)), shape=shape)
    aliases = [*map(called, VECTORS), names.old_diffusers_name(new)]
    others = tuple((alias,) for alias in dict.fromkeys(aliases) if alias != new)
    return _slot(path, shape, new, dimensions=dimensions, others=others)


def _autoencoder_slot(fields: dict[str, Any], layout: str, path: str, shape: tuple) -> Slot:
    kind = fields.get("kind", "kl")
    if kind == "tiny":
        code = "tiny" if layout == "compvis" else "diffusers_tiny"
        return _slot(path, shape, names.name_of(code, path))
    called = names.name_of("autoencoder", path)
    if layout == "compvis":
        return _slot(path, shape, called)
    levels = len(fields.get("ch_mult", AUTOENCODERS[kind].ch_mult))
    called = names.diffusers_autoencoder_name(called, levels)
    old = names.old_diffusers_name(called)
    # Attention consists of 1×1 convolutions in CompVis' code and of matrices in diffusers'.
    attention = re.search(r"attn_\d+/(q|k|v|proj_out)/", path)
    others = ((old,),) if old != called else ()
    return _slot(path, shape, called, dimensions=2 if attention else 0, others=others)


def _clip_slot(layout: str, path: str, shape: tuple) -> Slot:
    if layout != "openclip":
        called = names.name_of("clip", path)
        # transformers 5 omits the first part; its older versions need it.
        bare = called.removeprefix("text_model.")
        return _slot(path, shape, called, others=((bare,),) if bare != called else ())
    called = names.name_of("openclip", path)
    if path.startswith("text_projection"):
        return Slot(shape, (called,), shape)  # a plain matrix there, multiplied from the right
    slot = _slot(path, shape, called)
    third = re.search(r"self_attn/([qkv])_proj", path)
    if not third:
        return slot
    rows, *rest = slot.foreign
    return replace(slot, foreign=(3 * rows, *rest), part=("qkv".index(third[1]), 3))


def slots(
    network: str,
    fields: dict[str, Any],
    layout: str,
    vector: str = "add_embedding",
    new_attention_order: bool = False,
    learn_sigma: bool = False,
    leaves: dict[str, tuple[int, ...]] | None = None,
) -> dict[str, Slot]:
    """The slot of each leaf of a network in a layout, by our leaf path ("a/b/kernel").

    Args:
      network: "unet", "autoencoder", "clip", "bert", "class" or "rescaler".
      fields: of its module, as in a config; an autoencoder's with its "kind" (default "kl"), a
        rescaler's with the `in_channels` of its input.
      layout: one of `LAYOUTS[network]`.
      vector: where diffusers' UNets with num_classes="sequential" take their vector in:
        "add_embedding" (SDXL) or "class_embedding" (unCLIP). Either is read; this one is written.
      new_attention_order: whether CompVis' one `qkv` has q, k and v first and then heads, as with
        the original's `use_new_attention_order` (of attention without a context).
      learn_sigma: whether a UNet of CompVis' layout has as many further outputs for its variance
        (guided-diffusion's `learn_sigma`), which are not read.
      leaves: paths and shapes, if not all: those that a ControlNet has of its UNet.

    Raises ValueError for an unknown network, layout or kind, or fields that fit no module.
    """
    if network not in LAYOUTS:
        raise ValueError(f"network {network!r}: choose one of {', '.join(LAYOUTS)}")
    if layout not in LAYOUTS[network]:
        choices = ", ".join(LAYOUTS[network])
        raise ValueError(f"layout {layout!r} of network {network!r}: choose one of {choices}")
    if vector not in VECTORS:
        raise ValueError(f"vector={vector!r}: choose one of {', '.join(VECTORS)}")
    fields = tuples(fields)
    options = dict(vector=vector, new_attention_order=new_attention_order, learn_sigma=learn_sigma)

    def slot(path, shape):
        if network == "unet":
            return _unet_slot(fields, layout, options, path, shape)
        if network == "autoencoder":
            return _autoencoder_slot(fields, layout, path, shape)
        if network == "clip":
            return _clip_slot(layout, path, shape)
        code = "diffusers_bert" if (network, layout) == ("bert", "diffusers") else network
        return _slot(path, shape, names.name_of(code, path))

    leaves = leaves or shapes(network, fields)
    return {path: slot(path, shape) for path, shape in leaves.items()}


def read_params(
    state: Mapping[str, np.ndarray],
    slots: dict[str, Slot],
    prefix: str = "",
    dtype: Any = "float32",
    ignored: str = IGNORED,
) -> tuple[dict[str, Any], Report]:
    """Our nested params, of the given dtype and in their own memory, and the report.

    Leaves whose tensors are missing or misshapen are left out. Tensors are read one by one, so only
    one of a lazy `state` (`files.open_state`) is in memory besides the result.

    Args:
      state: foreign tensors by name.
      prefix: of the names in `state` that are this network's.
      ignored: regular expression for the rest, after the prefix, of keys that are not "extra".

    Raises ValueError, with file and key, for NaN or infinity.
    """
    shape_of = getattr(state, "shape", lambda key: state[key].shape)
    place = getattr(state, "place", str)
    kind = jnp.dtype(dtype)
    params, used, missing, misshapen = {}, set(), [], []
    for path, slot in slots.items():
        candidates = ([prefix + name for name in some] for some in (slot.names, *slot.others))
        keys = next((some for some in candidates if all(key in state for key in some)), None)
        if keys is None:
            missing += [key for name in slot.names if (key := prefix + name) not in state]
            continue
        used.update(keys)
        wrong = [key for key in keys if not slot.fits(shape_of(key))]
        misshapen += [
            f"{key}: expected {slot.foreign}, found {tuple(shape_of(key))}" for key in wrong
        ]
        if wrong:
            continue
        tensors = [state[key] for key in keys]
        for key, tensor in zip(keys, tensors, strict=True):
            if not np.isfinite(tensor).all():
                raise ValueError(f"{place(key)} holds NaN or infinity: these weights are broken")
        # Casting contiguous memory, before the transposition, is faster.
        tensors = [tensor.astype(kind, copy=False) for tensor in tensors]
        params[path] = np.array(slot.read(*tensors), order="C")
    theirs = (key for key in state if key.startswith(prefix) and key not in used)
    extra = [key for key in theirs if not re.fullmatch(ignored, key.removeprefix(prefix))]
    # A tensor that several leaves share is named once.
    report = Report(*(tuple(dict.fromkeys(odd)) for odd in (missing, extra, misshapen)))
    return unflatten_dict(params, sep="/"), report


def write_params(
    params: dict[str, Any], slots: dict[str, Slot], prefix: str = ""
) -> dict[str, np.ndarray]:
    """The foreign tensors by name, of the dtype of `params`: views of them if possible.

    Raises ValueError, with the path, for leaves that are missing, unknown or of another shape.
    """
    leaves = flatten_dict(params, sep="/")
    if odd := sorted(leaves.keys() ^ slots.keys()):
        lacking = sorted(slots.keys() - leaves.keys())
        raise ValueError(f"parameters: missing {lacking}, not of this network {sorted(odd)}")
    parts: dict[str, dict[int, np.ndarray]] = {}
    for path, slot in slots.items():
        leaf = np.asarray(leaves[path])
        if leaf.shape != slot.shape:
            raise ValueError(f"{path}: expected {slot.shape}, found {leaf.shape}")
        for name, tensor in zip(slot.names, slot.write(leaf), strict=True):
            parts.setdefault(prefix + name, {})[slot.part[0]] = tensor
    return {
        name: found[0] if len(found) == 1 else np.concatenate([found[i] for i in sorted(found)])
        for name, found in parts.items()
    }
