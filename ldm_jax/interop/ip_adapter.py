"""IP-Adapters: read for a model, from the original's files (`ip-adapter_sd15.safetensors`, `.bin`).

A file has the small network, `image_proj.…`, and keys and values of every cross-attention of the
UNet, `ip_adapter.N.to_k_ip.weight`. N counts all attentions as diffusers lists them: down, up, then
the middle, and of each block self-attention before cross-attention, so cross-attentions have odd
numbers. The image encoder is another file, CLIP's. `models.ip_adapter` is the network.
"""

import itertools
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.interop.control import read_whole
from ldm_jax.interop.fields import Shapes
from ldm_jax.interop.files import Tensors, open_shards, open_state
from ldm_jax.interop.layout import Slot, shapes
from ldm_jax.interop.vision_transformers import read_clip
from ldm_jax.models.ip_adapter import HEAD
from ldm_jax.published import MODELS

TASK = "ip_adapter"  # the kind of the section in a model's `conditioning`
PROJECTION, ATTENTION = "image_proj.", "ip_adapter."  # of the tensors' names
ENCODER = "image_encoder"  # the folder beside a file, as the original has it
DROPOUT = 0.05  # of pictures in the original's training (§4.1.2): guidance leads away from none
# Networks like an IP-Adapter, by tensors that only these have.
RELATIVES = {
    r"image_proj\.perceiver_resampler\.": "an IP-Adapter FaceID Plus, of faces' identities",
    r"image_proj\.proj\.2\.bias|ip_adapter\.\d+\.to_q_lora": "an IP-Adapter of faces (FaceID or "
    "full face)",
    r"image_proj\.layers\.\d+\.1\.1\.bias|(double|single)_blocks\.": "an IP-Adapter of Flux",
}
_NAMES = (
    (r"^image_proj/layers_(\d+)_(norm[12]|to_\w+)/", r"image_proj.layers.\1.0.\2."),
    (r"^image_proj/layers_(\d+)_norm3/", r"image_proj.layers.\1.1.0."),
    (r"^image_proj/layers_(\d+)_fc1/", r"image_proj.layers.\1.1.1."),
    (r"^image_proj/layers_(\d+)_fc2/", r"image_proj.layers.\1.1.3."),
    (r"^to_([kv])_(\d+)/", lambda m: f"ip_adapter.{2 * int(m[2]) + 1}.to_{m[1]}_ip."),
    (r"/", "."),
    (r"\.(kernel|scale)$", ".weight"),
)
Section = dict[str, Any]


def name_of(path: str) -> str:
    """The original's name of our leaf."""
    for pattern, replacement in _NAMES:
        path = re.sub(pattern, replacement, path)
    return path


def places_of(unet: Section) -> dict[str, int]:
    """The paths of a UNet's cross-attentions in the order of their numbers, and their channels."""
    found = {}
    place = r"((\w+?)_blocks?_(\d+)\w*/transformer_blocks_(\d+)/attn2)/to_k/kernel"
    for path, shape in shapes("unet", unet).items():
        if match := re.fullmatch(place, path):
            part = ("input", "output", "middle").index(match[2])
            found[(part, int(match[3]), int(match[4]))] = match[1], shape[1]
    return dict(found[key] for key in sorted(found))


def _such(context: int) -> str:
    """ ", such as TITLE": a published model with this width of the context."""
    titles = (m.title for m in MODELS.values() if m.unet.get("context_dim") == context)
    title = next(titles, None)
    return f", such as {title}" if title else ""


def _open(path: Path) -> Tensors:
    """The tensors of an IP-Adapter; ValueError for a file of something else."""
    if not path.is_file():
        what = "is a folder: name the file in it" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"no IP-Adapter at {path}: it {what}")
    state = open_state(path)
    for pattern, what in RELATIVES.items():
        if name := next((name for name in state if re.match(pattern, name)), None):
            raise ValueError(f"{path} is {what}, which is not supported (it has {name})")
    for prefix in (PROJECTION, ATTENTION):
        if not any(name.startswith(prefix) for name in state):
            raise ValueError(
                f"{path} holds no IP-Adapter: looked for {PROJECTION}* and {ATTENTION}*; found "
                f"{len(state)} tensors, such as {', '.join([*state][:3])}"
            )
    return state


def _check_base(path: Path, found: Shapes, context: int, places: dict[str, int], unet: Section):
    """Raises ValueError for an IP-Adapter of another model."""
    if not places or unet.get("context_dim") != context:
        raise ValueError(
            f"{path} is for a model with context_dim={context}{_such(context)}, and this one has "
            f"{unet.get('context_dim')}"
        )
    pattern = r"(\d+)\.to_k_ip\.weight"
    numbers = sorted(int(match[1]) for name in found if (match := re.fullmatch(pattern, name)))
    there = [found[f"{i}.to_k_ip.weight"][0] for i in numbers]
    if numbers != [*range(1, 2 * len(places), 2)] or there != [*places.values()]:
        rows = (there, [*places.values()])
        its, ours = (
            ", ".join(f"{len([*same])} × {n}" for n, same in itertools.groupby(row)) for row in rows
        )
        raise ValueError(
            f"{path} is for a model whose cross-attentions have {its} channels, and this one's "
            f"have {ours}"
        )


def _read_encoder(path: Path, adapter: Path) -> tuple[Section, dict[str, Any]]:
    """(fields of the image encoder, parameters); ValueError for a file of something else."""
    if path.is_dir():
        state, beside = open_shards(path, "model"), path / "model.safetensors"
    elif path.is_file():
        state, beside = open_state(path), path
    else:
        raise FileNotFoundError(
            f"no image encoder at {path}, for {adapter}: name CLIP's, a file or a folder of "
            "transformers, with image_encoder"
        )
    if not {"visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"} & {*state}:
        raise ValueError(
            f"{path} holds no image encoder of CLIP: found {len(state)} tensors, such as "
            f"{', '.join([*state][:3])}"
        )
    _, network, params = read_clip(state, beside)
    names = ("side", "patch", "width", "depth", "heads", "inner", "activation", "epsilon")
    names += ("patch_bias", "pre_norm", "projection")
    return {name: getattr(network, name) for name in names}, params


def read_ip_adapter(
    path: str | os.PathLike,
    encoder: str | os.PathLike,
    config: Section,
    dtype: Any = "float32",
) -> tuple[Section, dict[str, Any]]:
    """(section of `conditioning`, parameters) of an IP-Adapter for the model of `config`.

    Args:
      path: a file of the original's layout, plain or Plus, for SD 1, SD 2 or SDXL.
      encoder: CLIP's image encoder, a file or a folder of transformers; "": the folder
        `image_encoder` beside the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file of something else, or an unsupported kind; an adapter of another model or
        another image encoder; tensors that are missing, misshapen or not finite.
    """
    path = Path(path).expanduser()
    if "unet" not in config:
        raise ValueError(f"{path}: an IP-Adapter is for models with a UNet; this one has none")
    state = _open(path)
    found, places = Shapes(state, PROJECTION), places_of(config["unet"])
    encoder = Path(encoder).expanduser() if encoder else path.parent / ENCODER
    try:
        if "latents" in found:
            _, tokens, inner = found["latents"]
            heads = found["layers.0.0.to_q.weight"][0] // HEAD
            resampler = [inner, found.count(r"layers\.(\d+)\."), heads]
            width, taken = found["norm_out.weight"][0], found["proj_in.weight"][1]
        else:
            width, resampler = found["norm.weight"][0], None
            total, taken = found["proj.weight"]
            tokens = total // width
    except ValueError as error:
        raise ValueError(f"{path} holds no whole IP-Adapter: it {error}") from None
    _check_base(path, Shapes(state, ATTENTION), width, places, config["unet"])
    fields, own = _read_encoder(encoder, path)
    made = fields["projection"] if resampler is None else fields["width"]
    if made != taken:
        what = "patches" if resampler else "embeddings"
        raise ValueError(
            f"{path} takes {what} of {taken} numbers, and those of {encoder} have {made}: it is "
            "for another image encoder"
        )
    if resampler is not None:
        fields |= dict(hidden=True)
        unused = {"norm", "projection", f"layers_{fields['depth'] - 1}"}
        own = {name: leaves for name, leaves in own.items() if name not in unused}
    network = dict(encoder=fields, tokens=tokens, width=width, channels=[*places.values()])
    network["resampler"] = resampler
    params = read_whole(path, "IP-Adapter", state, ip_adapter_slots(network), "", dtype)
    params["encoder"] = _as_type(own, dtype)
    section = dict(kind=TASK, dropout=DROPOUT, places=[*places], network=network)
    return section, params


def ip_adapter_slots(network: Section) -> dict[str, Slot]:
    """The slot of each leaf but the image encoder's: see `layout.slots`."""

    def slot(path, shape):
        kernel = path.endswith("/kernel")
        return Slot(shape, (name_of(path),), shape[::-1] if kernel else shape, transposed=kernel)

    own = shapes(TASK, network)
    return {path: slot(path, s) for path, s in own.items() if not path.startswith("encoder/")}


def _as_type(tree: Any, dtype: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _as_type(leaf, dtype) for name, leaf in tree.items()}
    return np.asarray(tree, dtype)


def add_ip_adapter(
    path: str | os.PathLike,
    encoder: str | os.PathLike,
    config: Section,
    params: dict[str, Any],
    scale: float = 1.0,
    name: str = "",
) -> tuple[Section, dict[str, Any]]:
    """(config, parameters) of a model with the IP-Adapter of a file; see `read_ip_adapter`.

    Args:
      scale: of its effect.
      name: of its condition; default: "image_prompt", then "image_prompt_2", and so on.

    Raises ValueError as `read_ip_adapter`, for a name that is taken, and for no finite scale.
    """
    if not np.isfinite(scale):
        raise ValueError(f"scale={scale}: choose a finite number")
    sections, first = config["conditioning"], "image_prompt"
    if not name:
        names = (first if i == 1 else f"{first}_{i}" for i in itertools.count(1))
        name = next(name for name in names if name not in sections)
    if name in sections or name in params:
        raise ValueError(f"{path}: the model already has a condition {name!r}; choose another name")
    dtype = np.asarray(params["unet"]["out_2"]["bias"]).dtype
    section, own = read_ip_adapter(path, encoder, config, dtype)
    own |= dict(scale=np.asarray(scale, dtype))
    return config | {"conditioning": sections | {name: section}}, params | {name: own}
