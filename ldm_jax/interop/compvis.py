"""Reading and writing of single files in the layout of CompVis' or SGM's checkpoints."""

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
from ldm_jax.interop.layout import Imported, read_params, slots, write_params
from ldm_jax.interop.networks import networks, texts
from ldm_jax.interop.recognise import BUFFERS, STAGE, UNET, Part, recognise
from ldm_jax.interop.reports import Report
from ldm_jax.interop.yaml_config import Original
from ldm_jax.models.build import make_autoencoder

AVERAGED = "model_ema.diffusion_model"
CONDITIONER = r"cond_stage_model\.|conditioner\."
# The parts of a UNet's names; a longer one comes before its own prefix.
_WORDS = (
    *("transformer_blocks", "skip_connection", "middle_block", "time_embed", "label_emb"),
    *("in_layers", "out_layers", "emb_layers", "proj_out", "proj_in", "to_out", "to_[qkv]"),
    *("attn[12]", "norm[123]?", "weight", "bias", "proj", "conv", "qkv", "net", "out", "ff", "op"),
)
_PART = re.compile("|".join((r"(?:in|out)put_blocks\d+(?=\d\D)", *_WORDS, r"\d")))


def dotted(name: str) -> str:
    """The name of a UNet's tensor with the dots that Lightning's averages lack.

    "input_blocks110in_layers0weight" → "input_blocks.11.0.in_layers.0.weight": a block's number is
    followed by one more digit, and all other numbers have only one digit.
    """
    return re.sub(r"(put_blocks)(\d+)", r"\1.\2", ".".join(_PART.findall(name)))


def choose_weights(state: Tensors, ema: bool | str) -> tuple[Tensors, str]:
    """The tensors with either the UNet's trained or its averaged ones, and a description."""
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


def _completed(
    state: Tensors, autoencoder: Imported | None, text: Imported | None
) -> tuple[Tensors, set[str]]:
    """`state` with the shapes of other models' parts in place of its own, and their prefixes."""
    if not (autoencoder or text):
        return state, set()
    bare = "input_blocks.0.0.weight" in state
    kept = {f"{UNET}{name}" if bare else name: name for name in state}
    config: dict[str, Any] = dict(unet={}, conditioning={})
    if autoencoder:
        kept = {new: name for new, name in kept.items() if not new.startswith(STAGE)}
        section = autoencoder.config["autoencoder"]
        latents = make_autoencoder(section).embed_dim
        small = dict(ch=32, ch_mult=[1], num_res_blocks=1, z_channels=latents, embed_dim=latents)
        config["autoencoder"] = small | dict(kind="vq" if section.get("kind") == "vq" else "kl")
    if text:
        kept = {new: name for new, name in kept.items() if not re.match(CONDITIONER, new)}
        config["conditioning"] = texts(text.config)
    lent = [part for name, part in _parts(config).items() if name != "unet"]
    shapes = {
        f"{part.prefix}{name}": slot.foreign
        for part in lent
        for slot in slots(part.network, part.fields, part.layout).values()
        for name in slot.names
    }
    return state.renamed(kept).joined(shapes), {part.prefix for part in lent}


def read(
    path: str | os.PathLike,
    ema: bool | str = "auto",
    dtype: Any = "float32",
    *,
    state: Tensors | None = None,
    original: Original | None = None,
    new_attention_order: bool = False,
    autoencoder: Imported | None = None,
    text: Imported | None = None,
) -> Imported:
    """The model in a `.ckpt` or `.safetensors` in CompVis' or Stability's layout.

    A whole model, or an autoencoder, a UNet or a text encoder alone: see `recognise`. `reports` has
    an entry for each network, and "file" for keys that belong to none.

    Args:
      ema: which weights of the UNet to use, if the file has both: the trained (False, and "auto",
        as in CompVis' scripts, diffusers and web interfaces) or the averaged (True, and "auto" if
        some of the trained are missing).
      dtype: of the parameters.
      state: the result of `open_state` for the file, if it is open.
      original: the training YAML of the file: see `yaml_config`.
      new_attention_order: whether attention without a context has q, k and v first, then heads
        (`use_new_attention_order`), which no tensor determines.
      autoencoder, text: models whose autoencoder and text encoders will replace the file's own,
        which may be missing. The result does not contain them.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that `open_state` refuses; an unknown model, or one that contradicts the
        YAML; averages that are missing.
    """
    if ema not in ("auto", True, False):
        raise ValueError(f"ema={ema!r}: choose one of 'auto', True, False")
    state = open_state(path) if state is None else state
    try:
        state, weights = choose_weights(state, ema)
        state, lent = _completed(state, autoencoder, text)
        found = recognise(state)
        found = original.applied(found, state, lent) if original else found
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} {error}") from error
    params, reports = {}, {}
    for name, part in found.parts.items():
        if part.prefix in lent:
            continue
        options = dict(learn_sigma=part.learn_sigma)
        options["new_attention_order"] = part.new_attention_order or new_attention_order
        table = slots(part.network, part.fields, part.layout, **options)
        tree, reports[name] = read_params(state, table, part.prefix, dtype, part.ignored)
        if tree:
            params[name] = tree
    if found.config.get("autoencoder", {}).get("kind") == "identity":
        params["autoencoder"] = {}  # pixels in place of latents
    prefixes = tuple(part.prefix for part in found.parts.values())
    beside = (name for name in state if not name.startswith(prefixes))
    rest = tuple(name for name in beside if not re.fullmatch(BUFFERS, name))
    reports |= {"file": Report(extra=rest)} if rest else {}
    about = [f"{found.name}, in one file of CompVis' layout", weights]
    about += ["without its learned variance" for part in found.parts.values() if part.learn_sigma]
    return Imported(found.config, params, ", ".join(filter(None, about)), reports)


def _parts(config: dict[str, Any]) -> dict[str, Part]:
    """The prefix and layout of each network of a config in a file."""
    sections = config.get("conditioning", {})
    # SGM's files number their conditioners; others have one.
    sgm = any(s["kind"] == "sizes" or s.get("pooled") for s in sections.values())
    parts: dict[str, Part] = {}
    for name, (kind, fields) in networks(config).items():
        openclip = kind == "clip" and sections[name].get("padding") == "zero"
        place = f"conditioner.embedders.{len(parts.keys() & sections)}." if sgm else ""
        prefix = place or "cond_stage_model."
        prefix += "model." if openclip else "transformer." if kind in ("clip", "bert") else ""
        own = dict(unet=UNET, autoencoder=STAGE if "unet" in config else "")
        layout = "openclip" if openclip else "compvis"
        parts[name] = Part(kind, fields, layout, own.get(name, prefix))
    return parts


def _schedule(config: dict[str, Any]) -> DiscreteSchedule:
    schedule = make_schedule(**config["diffusion"]["schedule"])
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError("diffusion.schedule has no table of β, as CompVis' code needs one")
    return schedule


def _buffers(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a file besides its networks: the schedule and the scale of the latents."""
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
    """The differences between a config and the one read back from the file, as text."""
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
    """Writes one safetensors file that CompVis' or SGM's code can read, and all compatible readers.

    Names and prefixes are the originals'. SD 2's text encoder is written with 23 blocks, without
    the 24th and the projection, which it does not use. A v-prediction model that the usual rules
    would not recognise is marked as in ComfyUI, by a tensor "v_pred". The file does not contain the
    image size, sampler and vocabulary, nor options of training alone.

    The file is written whole or not at all.

    Raises:
      ValueError: a model that this layout cannot express; says how it would be read.
    """
    kind = jnp.dtype(dtype)
    tensors = _buffers(config)
    for name, part in _parts(config).items():
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
            f"{Path(path)}: a file of CompVis' layout cannot express this model, so nothing is "
            f"written: {'; '.join(lost)}"
        )
    write_safetensors(path, tensors, {"format": "pt"})
