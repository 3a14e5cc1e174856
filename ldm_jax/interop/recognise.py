"""Which model a file in CompVis' or SGM's layout holds, from the names and shapes of its tensors.

Shapes tell nearly all of a network: see `fields`. What they cannot tell, the heads of attention,
the noise schedule, what the output means, is as the model was published: see `families`. A file's
own buffers, where it has them, come first.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.interop.families import Family, array, concat_sections, find_family
from ldm_jax.interop.fields import (
    Shapes,
    State,
    autoencoder_fields,
    text_fields,
    unet_fields,
)
from ldm_jax.interop.layout import IGNORED
from ldm_jax.models.build import tuples
from ldm_jax.models.unet import UNet

UNET, STAGE = "model.diffusion_model.", "first_stage_model."
# What a conditioner is, by a tensor that only this kind has.
_SLOT = r"(?:cond_stage_model|conditioner\.embedders\.\d)"
CONDITIONERS = {
    "clip": rf"({_SLOT}\.transformer\.)(?:text_model\.)?embeddings\.token_embedding\.weight",
    "openclip": rf"({_SLOT}\.model\.)token_embedding\.weight",
    "bert": r"(cond_stage_model\.transformer\.)token_emb\.weight",
    "class": r"(cond_stage_model\.)embedding\.weight",
    "rescaler": r"(cond_stage_model\.)channel_mapper\.weight",
}
# What stands beside the networks: buffers of the schedule, training's own, averages, markers, and
# networks whose results the caller brings.
BUFFERS = (
    r"betas|alphas_cumprod(_prev)?|(sqrt|log)_\w+|posterior_\w+|logvar|scale_factor|lvlb_weights"
    r"|denoiser\.\w+|model_ema\..*|loss\..*|v_pred|ztsnr|cond_stage_model\.(logit_scale|text_projection)"
    r"|(depth_model|embedder|noise_augmentor|low_scale_model)\..*"
)
# Names that show what else a file may be, in the order in which they are asked.
OTHERS = {
    r"lora_|.*[._]lora": "a LoRA: it changes a model, see interop.lora",
    r"control_model\.": "a ControlNet, which is not supported",
    r"(model\.diffusion_model\.)?(joint_blocks|double_blocks|single_blocks|blocks)\.": "a "
    "diffusion transformer, where UNets are supported",
    r"(down_blocks|mid_block|up_blocks|conv_in|time_embedding)\.": "one network of a diffusers "
    "folder: name the folder, which says in JSON what it is",
    r"(encoder|decoder)\.(down_blocks|mid_block|up_blocks)\.": "the autoencoder of a diffusers "
    "folder: name the folder, which says in JSON what it is",
    r"text_model\.|(transformer\.)?resblocks\.": "a text encoder, of which no picture comes",
}


@dataclass(frozen=True)
class Part:
    """One network of a file.

    Attributes:
      network, fields, layout: as `layout.slots` takes them.
      prefix: of its tensors' names.
      ignored: what after the prefix may stand there unused, a regular expression.
    """

    network: str
    fields: dict[str, Any]
    layout: str
    prefix: str
    ignored: str = IGNORED


@dataclass(frozen=True)
class Recognised:
    """`config` of the model, and where the file keeps each network of it."""

    name: str
    config: dict[str, Any]
    parts: dict[str, Part] = field(default_factory=dict)


def _conditioners(state: State) -> list[tuple[str, str]]:
    """(kind, prefix) of each, in the file's own order. ValueError for one that we do not know."""
    found = []
    for kind, pattern in CONDITIONERS.items():
        found += [(m[1], kind) for name in state if (m := re.fullmatch(pattern, name))]
    for name in state:
        place = re.match(rf"{_SLOT}\.", name)
        known = place is None or any(prefix.startswith(place[0]) for prefix, _ in found)
        if not known and not re.fullmatch(BUFFERS, name):
            raise ValueError(
                f"holds a conditioner that we do not know, with {name}: looked for "
                f"{', '.join(CONDITIONERS)}"
            )
    return [(kind, prefix) for prefix, kind in sorted(found)]


Conditioner = tuple[str, dict[str, Any], Part]  # name and content of a section, and its network


def _clip(kind: str, shapes: Shapes, embedders: int) -> Conditioner:
    """CLIP's or OpenCLIP's encoder; `embedders` is how many an SGM file has, 0 elsewhere."""
    network, section = text_fields(kind, shapes), dict(kind="clip", vocabulary="clip", dropout=0.1)
    section["padding"] = "end" if kind == "clip" else "zero"
    name, ignored = "text_2" if embedders and kind == "openclip" else "text", IGNORED
    if embedders:
        network |= dict(layer="penultimate", final_norm=False)
        # Where there is no prompt, SGM tells the base zeros, and the refiner the empty prompt.
        section |= dict(zero_null=True) if embedders == 2 else {}
    if name == "text_2":
        network["projection"] = shapes["text_projection"][1]
        section["pooled"] = True
    elif kind == "openclip" and "text_projection" in shapes:
        # The whole encoder, of which SD 2 takes the output of the last block but one. Who leaves
        # out the last, as others and we do, leaves out the projection after it.
        network["depth"] -= 1
        ignored += rf"|text_projection|transformer\.resblocks\.{network['depth']}\..*"
    layout = "compvis" if kind == "clip" else "openclip"
    part = Part("clip", network, layout, shapes.prefix, ignored)
    return name, section | dict(network=network), part


def _bert(shapes: Shapes) -> Conditioner:
    network = text_fields("bert", shapes)
    part = Part("bert", network, "compvis", shapes.prefix)
    words = network["vocab_size"] == 30522
    if words:
        network = {key: value for key, value in network.items() if key != "vocab_size"}
        return "text", dict(kind="text", vocabulary="bert", dropout=0.1, network=network), part
    # Of boxes and what is in them (layout2img-openimages256).
    section = array("context", network["max_length"])
    return "boxes", section | dict(network=dict(kind="transformer", **network)), part


def _class(shapes: Shapes) -> Conditioner:
    classes, width = shapes["embedding.weight"]
    network = dict(n_classes=classes, embed_dim=width)
    # ImageNet's thousand, and one that stands for none (cin256-v2).
    null = 1000 if classes == 1001 else None
    section = dict(kind="class", null=null, dropout=0.0 if null is None else 0.1, network=network)
    return "label", section, Part("class", network, "compvis", shapes.prefix)


def _rescaler(shapes: Shapes) -> Conditioner:
    out, channels = shapes["channel_mapper.weight"][:2]
    network: dict[str, Any] = dict(n_stages=2, out_channels=out)  # all that were released halve so
    if "channel_mapper.bias" in shapes:
        network["use_bias"] = True
    part = Part("rescaler", network | dict(in_channels=channels), "compvis", shapes.prefix)
    section = array("concat", None, None, channels)
    return "segmentation", section | dict(network=dict(kind="rescaler", **network)), part


def _sizes(vector: int, pooled: int, where: str) -> dict[str, Any]:
    """SDXL's numbers, of which each takes 256 of the vector beside the pooled text."""
    fields = {6: ["original_size", "crop", "target_size"]}
    fields[5] = ["original_size", "crop", "aesthetic_score"]
    count, rest = divmod(vector - pooled, 256)
    if rest or count not in fields:
        raise ValueError(
            f"{where}: a vector of {vector} and a text of {pooled} leave no 5 or 6 sizes"
        )
    return dict(kind="sizes", fields=fields[count], dropout=0.0)


def _alphas_cumprod(state: State) -> tuple[str, np.ndarray] | None:
    """ᾱ_t of the file's buffers, and the key that holds it."""
    if "alphas_cumprod" in state:
        return "alphas_cumprod", np.asarray(state["alphas_cumprod"], np.float64)
    if "betas" in state:
        return "betas", np.cumprod(1.0 - np.asarray(state["betas"], np.float64))
    if "denoiser.sigmas" in state:
        sigmas = np.sort(np.asarray(state["denoiser.sigmas"], np.float64))
        return "denoiser.sigmas", 1.0 / (1.0 + sigmas**2)
    return None


def schedule_section(state: State, betas: tuple[float, float]) -> dict[str, Any]:
    """`diffusion.schedule`: what the file's buffers are, or else "linear" between `betas`.

    Raises ValueError for buffers that no schedule of ours gives.
    """
    section = dict(name="linear", timesteps=1000, start=betas[0], end=betas[1])
    section["zero_terminal_snr"] = "ztsnr" in state
    found = _alphas_cumprod(state)
    if found is None:
        return section
    key, table = found
    ends = 1.0 - table[0], 1.0 - table[-1] / max(table[-2], 1e-12)
    start, end = (float(f"{beta:.4g}") for beta in ends)
    candidates = [section | dict(timesteps=len(table))]
    candidates += [candidates[0] | dict(name=name, start=start, end=end)
                   for name in ("linear", "sqrt_linear", "cosine")]  # fmt: skip
    candidates += [dict(c, zero_terminal_snr=True) for c in candidates]
    half = np.dtype(state[key].dtype).itemsize < 4
    for candidate in candidates:
        ours = make_schedule(**candidate).alphas_cumprod
        if np.allclose(ours, table, rtol=0.0, atol=4e-3 if half else 2e-5):
            return candidate
    raise ValueError(f"{key}: no schedule of ours has these {len(table)} values")


def _means_v(state: State, family: Family, fields: dict[str, Any]) -> bool:
    """Whether the UNet's output is v, where files of one shape differ (SD 2).

    ComfyUI's rule: a norm of the last level but one is far from where it began only in the models
    that were trained on for v. ComfyUI's mark, a tensor "v_pred", decides for any model.
    """
    if "v_pred" in state or family.parameterization == "v":
        return True
    norm = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    asked = family.parameterization == "eps or v" and fields["in_channels"] == 4
    return asked and norm in state and float(np.std(np.asarray(state[norm], np.float32))) > 0.09


def _scale(state: State, default: float) -> float:
    # As float32 it is read as what was written: 0.18215, not 0.18215000629425049.
    return float(str(np.float32(state["scale_factor"]))) if "scale_factor" in state else default


def _autoencoder_alone(state: State) -> Recognised:
    fields = autoencoder_fields(Shapes(state))
    # 4 channels are Stable Diffusion's at ⅛ and its upscaler's at ¼; others were used unscaled.
    scales = {(4, 4): 0.18215, (4, 3): 0.08333} if fields["kind"] == "kl" else {}
    scale = scales.get((fields["embed_dim"], len(fields["ch_mult"])), 1.0)
    if "quant_conv.weight" not in state:
        scale = 1.0
    part = Part("autoencoder", fields, "compvis", "", f"{IGNORED}|{BUFFERS}")
    config = dict(fields, scale_factor=_scale(state, scale))
    return Recognised(
        f"{fields['kind'].upper()} autoencoder",
        dict(task="autoencoder", autoencoder=config),
        dict(autoencoder=part),
    )


def _unet_alone(state: State, prefix: str) -> Recognised:
    fields = unet_fields(Shapes(state, prefix))
    family = find_family(fields, None, None)
    fields |= family.heads
    config = dict(task="unet", unet=fields)
    return Recognised(f"UNet of {family.name}", config, _unet_part(fields, prefix))


def _unet_part(fields: dict[str, Any], prefix: str) -> dict[str, Part]:
    ignored = IGNORED if prefix else f"{IGNORED}|{BUFFERS}"
    return dict(unet=Part("unet", fields, "compvis", prefix, ignored))


def _check_told(sections: dict[str, Any], unet: dict[str, Any]) -> None:
    """Raises ValueError if the UNet takes what nothing in the file gives."""
    outputs = {section.get("output", "context") for section in sections.values()}
    outputs |= {"vector" for section in sections.values() if section["kind"] == "sizes"}
    for name, output in (("context_dim", "context"), ("num_classes", "vector")):
        if unet.get(name) is not None and output not in outputs:
            raise ValueError(
                f"holds a UNet with {name}={unet[name]!r}, but no conditioner that we know gives "
                f"it a {output}: looked for {', '.join(CONDITIONERS)}"
            )


def _whole_model(state: State) -> Recognised:
    found = _conditioners(state)
    embedders = sum(prefix.startswith("conditioner.") for _, prefix in found)
    parts, sections, told = {}, {}, ""
    for told, prefix in found:
        shapes = Shapes(state, prefix)
        if told in ("clip", "openclip"):
            name, section, part = _clip(told, shapes, embedders)
        else:
            makers = {"bert": _bert, "class": _class, "rescaler": _rescaler}
            name, section, part = makers[told](shapes)
        told = name if name == "boxes" else told
        sections[name], parts[name] = section, part
    if embedders:
        told = "sdxl" if embedders == 2 else "refiner"
    widths = [
        s["network"].get("width") or s["network"].get("embed_dim", 0) for s in sections.values()
    ]
    fields = unet_fields(Shapes(state, UNET), sum(widths) or None)
    if sum(widths) not in (0, fields.get("context_dim")):
        raise ValueError(
            f"{UNET}*: context_dim={fields.get('context_dim')}, but its conditioners are {widths} "
            "wide"
        )
    stage = autoencoder_fields(Shapes(state, STAGE))
    family = find_family(fields, told, stage["kind"])
    fields |= family.heads
    if embedders:
        pooled = sections["text_2"]["network"]["projection"]
        where = f"{UNET}label_emb.0.0.weight"
        sections["sizes"] = _sizes(fields.get("adm_in_channels", 0), pooled, where)
    if family.extra:
        sections |= family.extra(UNet(**tuples(fields)))
    elif told in ("clip", "openclip", "sdxl", "refiner"):
        sections |= concat_sections(fields["in_channels"], stage["embed_dim"])
    _check_told(sections, fields)
    v = _means_v(state, family, fields)
    grid, sampler = family.grid
    large = family.parameterization == "eps or v" and v
    dropped = any(section["dropout"] for section in sections.values())
    config = dict(
        task="diffusion",
        image_size=768 if large else family.size,
        unet=fields,
        autoencoder=dict(stage, scale_factor=_scale(state, family.scale)),
        conditioning=sections,
        diffusion=dict(
            schedule=schedule_section(state, family.betas),
            parameterization="v" if v else "eps",
            **grid,
            sigma_data=0.5,
        ),
        sampling=dict(
            sampler=sampler, steps=50, guidance=family.guidance if dropped else 1.0, eta=0.0
        ),
    )
    parts |= _unet_part(fields, UNET) | dict(
        autoencoder=Part("autoencoder", stage, "compvis", STAGE)
    )
    name = family.name + (" inpainting" if told and "masked_image" in sections else "")
    return Recognised(name + (", v-prediction" if large else ""), config, parts)


def recognise(state: State) -> Recognised:
    """The model that a single file holds: all of it, an autoencoder, or a UNet (task "unet").

    `state` is the file's tensors; only shapes are looked at, and the values of a few buffers.

    Raises ValueError, which says what was looked for and what was found.
    """
    stage, unet = (any(name.startswith(prefix) for name in state) for prefix in (STAGE, UNET))
    if unet and f"{UNET}input_blocks.0.0.weight" in state:
        if stage:
            return _whole_model(state)
        if _conditioners(state):
            raise ValueError(f"holds a UNet and what conditions it, but no autoencoder ({STAGE}*)")
        return _unet_alone(state, UNET)
    if "encoder.conv_in.weight" in state and "encoder.down.0.block.0.conv1.weight" in state:
        return _autoencoder_alone(state)
    if "input_blocks.0.0.weight" in state:
        return _unet_alone(state, "")
    for pattern, what in OTHERS.items():
        name = next((name for name in state if re.match(pattern, name)), None)
        if name:
            raise ValueError(f"is {what} (it has {name})")
    some = ", ".join(list(state)[:3])
    raise ValueError(
        f"is no model in CompVis' or SGM's layout: looked for {UNET}input_blocks.* and {STAGE}*, "
        "for an autoencoder's encoder.down.*, and for a UNet's input_blocks.*; found "
        f"{len(state)} tensors, such as {some}"
    )
