"""One file in the layout of CompVis' or SGM's code, as their checkpoints are: read and written."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.schedule import DiscreteSchedule, make_schedule
from ldm_jax.interop.fields import canonical
from ldm_jax.interop.files import Tensors, open_state, write_safetensors
from ldm_jax.interop.layout import Imported, Report, read_params, slots, write_params
from ldm_jax.interop.recognise import BUFFERS, STAGE, UNET, Part, recognise

AVERAGED = "model_ema.diffusion_model"
# The parts of a UNet's names; longer ones before those that they begin with.
_WORDS = (
    *("transformer_blocks", "skip_connection", "middle_block", "time_embed", "label_emb"),
    *("in_layers", "out_layers", "emb_layers", "proj_out", "proj_in", "to_out", "to_[qkv]"),
    *("attn[12]", "norm[123]?", "weight", "bias", "proj", "conv", "qkv", "net", "out", "ff", "op"),
)
_PART = re.compile("|".join((r"(?:in|out)put_blocks\d+(?=\d\D)", *_WORDS, r"\d")))


def dotted(name: str) -> str:
    """The name of a UNet's tensor with the dots that Lightning's averages lack.

    "input_blocks110in_layers0weight" → "input_blocks.11.0.in_layers.0.weight": a block's number is
    followed by one more digit, and all other numbers have but one.
    """
    return re.sub(r"(put_blocks)(\d+)", r"\1.\2", ".".join(_PART.findall(name)))


def choose_weights(state: Tensors, ema: bool | str) -> tuple[Tensors, str]:
    """The tensors with the UNet's trained or averaged ones in place of both, and which it is."""
    averaged = {
        UNET + dotted(name.removeprefix(AVERAGED)): name
        for name in state
        if name.startswith(AVERAGED)
    }
    online = {name for name in state if name.startswith(UNET)}
    if ema == "auto":
        ema = bool(averaged) and not averaged.keys() <= online and online <= averaged.keys()
    if not ema:
        return state, "weights as trained; ema=True reads the averaged" if averaged else ""
    if not averaged:
        raise ValueError(f"holds no averaged weights ({AVERAGED}*): read it with ema=False")
    if lacking := sorted(online - averaged.keys()):
        raise ValueError(f"holds no average of {lacking[0]}: read it with ema=False")
    kept = {name: name for name in state if name not in online and not name.startswith(AVERAGED)}
    return state.renamed(kept | averaged), "averaged weights (EMA)"


def read(path: str | os.PathLike, ema: bool | str = "auto", dtype: Any = "float32") -> Imported:
    """The model in a `.ckpt` or `.safetensors` of CompVis, Stability or those who followed them.

    All of a model, or an autoencoder or a UNet alone: see `recognise`. `reports` has an entry for
    each network, and "file" for what belongs to none of them.

    Args:
      ema: which weights of the UNet, where the file has both: as trained (False, and "auto", as
        CompVis' scripts, diffusers and web interfaces read them) or averaged (True, and "auto"
        where some of the trained are not there).
      dtype: of the parameters.

    Raises:
      FileNotFoundError: no such file.
      ValueError: what `open_state` refuses; no model that we know; averages that are not there.
    """
    return read_state(path, open_state(path), ema, dtype)


def read_state(
    path: str | os.PathLike, state: Tensors, ema: bool | str = "auto", dtype: Any = "float32"
) -> Imported:
    """`read` of a file that is open already."""
    if ema not in ("auto", True, False):
        raise ValueError(f"ema={ema!r}: choose one of 'auto', True, False")
    try:
        state, weights = choose_weights(state, ema)
        found = recognise(state)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} {error}") from error
    params, reports = {}, {}
    for name, part in found.parts.items():
        table = slots(part.network, part.fields, part.layout)
        tree, reports[name] = read_params(state, table, part.prefix, dtype, part.ignored)
        if tree:
            params[name] = tree
    prefixes = tuple(part.prefix for part in found.parts.values())
    beside = (name for name in state if not name.startswith(prefixes))
    rest = tuple(name for name in beside if not re.fullmatch(BUFFERS, name))
    reports |= {"file": Report(extra=rest)} if rest else {}
    about = ", ".join(filter(None, (f"{found.name}, in one file of CompVis' layout", weights)))
    return Imported(found.config, params, about, reports)


def _conditioner(name: str, section: dict[str, Any], place: int | None, params: Any) -> Part:
    """Where a section's network goes; `place` is its number among SGM's embedders, else None."""
    fields = dict(section["network"])
    kind = fields.pop("kind", section["kind"])
    if kind == "clip":
        openclip = section.get("padding") == "zero"
        base = "cond_stage_model." if place is None else f"conditioner.embedders.{place}."
        layout = "openclip" if openclip else "compvis"
        return Part("clip", fields, layout, base + ("model." if openclip else "transformer."))
    if kind in ("text", "transformer"):
        fields["vocab_size"] = len(params["token_emb"]["embedding"])
        return Part("bert", fields, "compvis", "cond_stage_model.transformer.")
    if kind == "rescaler":
        fields["in_channels"] = section["shape"][-1]
    return Part(kind, fields, "compvis", "cond_stage_model.")


def _parts(config: dict[str, Any], params: dict[str, Any]) -> dict[str, Part]:
    if config["task"] == "autoencoder":
        return dict(autoencoder=Part("autoencoder", config["autoencoder"], "compvis", ""))
    parts = dict(unet=Part("unet", config["unet"], "compvis", UNET))
    if config["task"] == "unet":
        return parts
    parts["autoencoder"] = Part("autoencoder", config["autoencoder"], "compvis", STAGE)
    sections = config["conditioning"]
    sgm = any(section["kind"] == "sizes" for section in sections.values())
    networks = {name: section for name, section in sections.items() if section.get("network")}
    for place, (name, section) in enumerate(networks.items()):
        parts[name] = _conditioner(name, section, place if sgm else None, params.get(name))
    return parts


def _schedule(config: dict[str, Any]) -> DiscreteSchedule:
    schedule = make_schedule(**config["diffusion"]["schedule"])
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError("diffusion.schedule has no table of β, as CompVis' code needs one")
    return schedule


def _buffers(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """What is in a file beside its networks: the schedule and the scale of the latents."""
    buffers = {}
    scale = config.get("autoencoder", {}).get("scale_factor", 1.0)
    if "autoencoder" in config:
        buffers["scale_factor"] = np.asarray(scale, np.float32)
    if "diffusion" in config:
        schedule = _schedule(config)
        buffers["betas"] = schedule.betas.astype(np.float32)
        buffers["alphas_cumprod"] = schedule.alphas_cumprod.astype(np.float32)
    return buffers


def _unlike(here: dict, there: dict, where: str) -> Iterable[str]:
    for key in sorted(here.keys() | there.keys()):
        ours, theirs = here.get(key), there.get(key)
        if ours != theirs:
            yield f"{where}{key}={ours!r} would be read as {theirs!r}"


def _lost(config: dict[str, Any], found: dict[str, Any]) -> Iterable[str]:
    """What of a config does not come back from the file: text for each."""
    if config["task"] != found["task"]:
        yield f"task={config['task']!r} would be read as {found['task']!r}"
        return
    here, there = canonical(config), canonical(found)
    for name in ("unet", "autoencoder"):
        yield from _unlike(here.get(name, {}), there.get(name, {}), f"{name}.")
    if config["task"] != "diffusion":
        return
    ours, theirs = here["conditioning"], there["conditioning"]
    if len(ours) != len(theirs):
        yield f"conditioning {list(ours)} would be read as {list(theirs)}"
    for (name, section), other in zip(ours.items(), theirs.values(), strict=False):
        networks = (part.pop("network", {}) for part in (section, other))
        yield from _unlike(section, other, f"conditioning.{name}.")
        yield from _unlike(*networks, f"conditioning.{name}.network.")
    key = "parameterization"
    meanings = ({key: c["diffusion"][key]} for c in (config, found))
    yield from _unlike(*meanings, "diffusion.")
    tables = (_schedule(c).alphas_cumprod for c in (config, found))
    if not np.allclose(*tables, rtol=0.0, atol=2e-5):
        yield "diffusion.schedule would be read as another"


def write(
    path: str | os.PathLike, config: dict[str, Any], params: dict[str, Any], dtype: Any = "float32"
) -> None:
    """Writes one safetensors file that CompVis' or SGM's code, and all who read theirs, can read.

    Names and prefixes are the originals'. Of SD 2's text encoder there are 23 blocks, without the
    24th and the projection, which it does not use. What means v and would not be seen by the usual
    rules is marked as ComfyUI does, by a tensor "v_pred". Image size, sampler and vocabulary are
    not in such a file, and neither is what only training knows.

    The file appears whole or not at all.

    Raises:
      ValueError: a model that this layout cannot say, with what would be read instead.
    """
    kind = jnp.dtype(dtype)
    tensors = _buffers(config)
    for name, part in _parts(config, params).items():
        table = slots(part.network, part.fields, part.layout)
        tree = jax.tree.map(lambda leaf: np.asarray(leaf).astype(kind, copy=False), params[name])
        tensors |= write_params(tree, table, part.prefix)
        if part.network == "clip" and part.layout == "compvis":
            positions = np.arange(part.fields["max_length"], dtype=np.int64)[None]
            tensors[f"{part.prefix}text_model.embeddings.position_ids"] = positions
    try:
        found = recognise(tensors).config
        means_v = [c.get("diffusion", {}).get("parameterization") == "v" for c in (config, found)]
        if means_v == [True, False]:
            tensors["v_pred"] = np.zeros(0, np.float32)
            found = recognise(tensors).config
        lost = list(_lost(config, found))
    except ValueError as error:
        lost = [f"it {error}"]
    if lost:
        raise ValueError(
            f"{Path(path)}: a file of CompVis' layout cannot say this model, so nothing is "
            f"written: {'; '.join(lost)}"
        )
    write_safetensors(path, tensors, {"format": "pt"})
