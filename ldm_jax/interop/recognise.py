"""Recognises the model in a file of CompVis' or SGM's layout by its tensors' names and shapes.

Shapes determine nearly all fields of a network: see `fields`. The others, the heads of attention,
the noise schedule and the meaning of the output, are those of the most similar published model: see
`families`. A file's own buffers, if it has them, take precedence.
"""

import re
from dataclasses import dataclass, field, replace

import numpy as np

from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.interop.families import array, brought_sections, find_family, lists
from ldm_jax.interop.fields import (
    Fields,
    Shapes,
    State,
    autoencoder_fields,
    text_fields,
    unet_fields,
)
from ldm_jax.interop.layout import IGNORED
from ldm_jax.published import AUTOENCODERS, HIDDEN, MODELS, Model, sizes, text

UNET, STAGE = "model.diffusion_model.", "first_stage_model."
# The kind of a conditioner, by a tensor that only this kind has.
_SLOT = r"(?:cond_stage_model|conditioner\.embedders\.\d)"
CONDITIONERS = {
    "clip": rf"({_SLOT}\.transformer\.)(?:text_model\.)?embeddings\.token_embedding\.weight",
    "openclip": rf"({_SLOT}\.model\.)token_embedding\.weight",
    "bert": r"(cond_stage_model\.transformer\.)token_emb\.weight",
    "class": r"(cond_stage_model\.)embedding\.weight",
    "rescaler": r"(cond_stage_model\.)channel_mapper\.weight",
}
# Tensors besides the networks: buffers of the schedule and of training, averages, markers, and
# networks whose results the caller provides.
BUFFERS = (
    r"betas|alphas_cumprod(_prev)?|(sqrt|log)_\w+|posterior_\w+|logvar|scale_factor|lvlb_weights"
    r"|denoiser\.\w+|model_ema\..*|loss\..*|v_pred|ztsnr|cond_stage_model\.(logit_scale|text_projection)"
    r"|(depth_model|embedder|noise_augmentor|low_scale_model)\..*"
)
# Names that identify other kinds of files, in the order of the checks.
OTHERS = {
    r"lora_|.*[._]lora": "a LoRA: it changes a model, see interop.lora",
    r"control_model\.|controlnet_|input_hint_block\.": "a ControlNet: it is drawn with beside a "
    "model, --control=PATH:HINT",
    r"(adapter\.)?body\.\d+\.(block\d|in_conv|body|resnets)\.": "a T2I-Adapter: it is drawn with "
    "beside a model, --control=PATH:HINT",
    r"(image_proj|ip_adapter)\.": "an IP-Adapter: it is drawn with beside a model, "
    "--ip_adapter=PATH:PICTURE",
    r"(model\.diffusion_model\.)?(joint_blocks|double_blocks|single_blocks|blocks)\.": "a "
    "diffusion transformer, where UNets are supported",
    r"(down_blocks|mid_block|up_blocks|conv_in|time_embedding)\.": "one network of a diffusers "
    "folder: name the folder, whose JSON describes it",
    r"(encoder|decoder)\.(down_blocks|mid_block|up_blocks)\.": "the autoencoder of a diffusers "
    "folder: name the folder, whose JSON describes it",
}


@dataclass(frozen=True)
class Part:
    """One network of a file.

    Attributes:
      network, fields, layout: as `layout.slots` takes them.
      prefix: of its tensors' names.
      ignored: regular expression for unused tensors' names after the prefix.
      new_attention_order: see `published.Model`.
      learn_sigma: see `published.Model`; `fields` are without the variance.
    """

    network: str
    fields: Fields
    layout: str
    prefix: str
    ignored: str = IGNORED
    new_attention_order: bool = False
    learn_sigma: bool = False


@dataclass(frozen=True)
class Recognised:
    """The `config` of the model, and the place of each network in the file."""

    name: str
    config: Fields
    parts: dict[str, Part] = field(default_factory=dict)


def _conditioners(state: State) -> list[tuple[str, str]]:
    """(kind, prefix) of each, in the file's own order. ValueError for an unknown one."""
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


Conditioner = tuple[str, Fields, Part]  # name and content of a section, and its network


def _clip(kind: str, shapes: Shapes, embedders: int) -> Conditioner:
    """CLIP's or OpenCLIP's encoder; `embedders` is how many an SGM file has, 0 elsewhere."""
    network, ignored, more = text_fields(kind, shapes), IGNORED, {}
    name = "text_2" if embedders and kind == "openclip" else "text"
    if embedders:
        network |= HIDDEN
        more = dict(zero_null=True) if embedders == 2 else {}
    if name == "text_2":
        network["projection"] = shapes["text_projection"][1]
        more |= dict(pooled=True)
    elif kind == "openclip" and "text_projection" in shapes:
        # The whole encoder; SD 2 uses the output of the last block but one. Like other software, we
        # leave out the last block, and so the projection after it.
        network["depth"] -= 1
        ignored += rf"|text_projection|transformer\.resblocks\.{network['depth']}\..*"
    layout = "compvis" if kind == "clip" else "openclip"
    part = Part("clip", network, layout, shapes.prefix, ignored)
    return name, text(kind, network, **more), part


def _bert(shapes: Shapes) -> Conditioner:
    network = text_fields("bert", shapes)
    part = Part("bert", network, "compvis", shapes.prefix)
    if network["vocab_size"] == 30522:
        network = {key: value for key, value in network.items() if key != "vocab_size"}
        return "text", text("bert", network), part
    # Boxes and their classes (layout2img-openimages256).
    network = dict(kind="transformer", **network)
    return "boxes", array("context", network["max_length"], network=network), part


def _class(shapes: Shapes) -> Conditioner:
    classes, width = shapes["embedding.weight"]
    network = dict(n_classes=classes, embed_dim=width)
    # ImageNet's thousand classes, and one for no class (cin256-v2).
    null = 1000 if classes == 1001 else None
    section = dict(kind="class", null=null, dropout=0.0 if null is None else 0.1, network=network)
    return "label", section, Part("class", network, "compvis", shapes.prefix)


def _rescaler(shapes: Shapes) -> Conditioner:
    out, channels = shapes["channel_mapper.weight"][:2]
    network = dict(n_stages=2, out_channels=out)  # all that were released halve so
    network |= dict(use_bias=True) if "channel_mapper.bias" in shapes else {}
    part = Part("rescaler", network | dict(in_channels=channels), "compvis", shapes.prefix)
    section = array("concat", None, None, channels, network=dict(kind="rescaler", **network))
    return "segmentation", section, part


def _sizes(vector: int, pooled: int, where: str) -> Fields:
    """SDXL's sizes; each number has 256 entries of the vector, after the pooled text."""
    count, rest = divmod(vector - pooled, 256)
    last = {6: "target_size", 5: "aesthetic_score"}.get(count)
    if rest or not last:
        raise ValueError(
            f"{where}: a vector of {vector} and a text of {pooled} leave no 5 or 6 sizes"
        )
    return lists(sizes("original_size", "crop", last))


# ᾱ_t from a file's buffers; the first existing one counts.
ALPHAS_CUMPROD = {
    "alphas_cumprod": lambda table: table,
    "betas": lambda betas: np.cumprod(1.0 - betas),
    "denoiser.sigmas": lambda sigmas: 1.0 / (1.0 + np.sort(sigmas) ** 2),
}


def schedule_section(state: State, published: Fields) -> Fields:
    """`diffusion.schedule` from the file's buffers, else from `published`.

    Raises ValueError for buffers that none of our schedules gives.
    """
    section = dict(published, zero_terminal_snr="ztsnr" in state)
    key = next((key for key in ALPHAS_CUMPROD if key in state), None)
    if key is None:
        return section
    table = ALPHAS_CUMPROD[key](np.asarray(state[key], np.float64))
    ends = 1.0 - table[0], 1.0 - table[-1] / max(table[-2], 1e-12)
    start, end = (float(f"{beta:.4g}") for beta in ends)
    section["timesteps"] = len(table)
    names = ("linear", "sqrt_linear", "cosine")
    found = [section, *(section | dict(name=name, start=start, end=end) for name in names)]
    tolerance = 4e-3 if np.dtype(state[key].dtype).itemsize < 4 else 2e-5  # of half precision
    for candidate in (*found, *(one | dict(zero_terminal_snr=True) for one in found)):
        ours = make_schedule(**candidate).alphas_cumprod
        if np.allclose(ours, table, rtol=0.0, atol=tolerance):
            return candidate
    raise ValueError(f"{key}: no schedule of ours has these {len(table)} values")


def _as_output_means(model: Model, state: State) -> Model:
    """The model, or the v-prediction model of the same networks, if the file is one.

    ComfyUI's rule, if both were published (SD 2): a norm of the last level but one is far from its
    initial value only in the v-prediction models. ComfyUI's mark, a tensor "v_pred", decides for
    any model.
    """
    if model.noise["parameterization"] == "v":
        return model
    both = (m for m in MODELS.values() if (m.unet, m.conditions) == (model.unet, model.conditions))
    of_v = next((m for m in both if m.noise["parameterization"] == "v"), None)
    norm = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if "v_pred" in state:
        return of_v or replace(model, noise=model.noise | dict(parameterization="v"))
    moved = of_v and norm in state and np.std(np.asarray(state[norm], np.float32)) > 0.09
    return of_v if moved else model


def _scale(state: State, default: float) -> float:
    # As float32 it is read as what was written: 0.18215, not 0.18215000629425049.
    return float(str(np.float32(state["scale_factor"]))) if "scale_factor" in state else default


def _autoencoder_alone(state: State, prefix: str = "") -> Recognised:
    def kind(section: Fields) -> tuple:
        levels = len(section.get("ch_mult", ()))
        quantised = section.get("use_quant_conv", True)
        return section.get("kind", "kl"), section.get("embed_dim"), levels, quantised

    fields = autoencoder_fields(Shapes(state, prefix))
    # Of those with the same tensors, the first that was used with a scale.
    alike = [row.scale for row in AUTOENCODERS.values() if kind(row.fields) == kind(fields)]
    scale = next((scale for scale in alike if scale != 1.0), 1.0)
    part = Part("autoencoder", fields, "compvis", prefix, f"{IGNORED}|{BUFFERS}")
    config = dict(task="autoencoder", autoencoder=dict(fields, scale_factor=_scale(state, scale)))
    return Recognised(f"{fields['kind'].upper()} autoencoder", config, dict(autoencoder=part))


def _unet_alone(state: State, prefix: str) -> Recognised:
    fields = unet_fields(Shapes(state, prefix))
    model = find_family(fields, None, None)
    fields |= model.heads
    parts = _unet_part(fields, prefix)
    if not model.learn_sigma:
        return Recognised(f"UNet of {model.title}", dict(task="unet", unet=fields), parts)
    # Guided diffusion: a whole model of pixels is only a UNet.
    fields["out_channels"] //= 2
    options = dict(new_attention_order=model.new_attention_order, learn_sigma=True)
    config = _config(model, fields, model.autoencoder.fields, brought_sections(model, fields))
    return Recognised(model.title, config, dict(unet=replace(parts["unet"], **options)))


def _config(model: Model, unet: Fields, autoencoder: Fields, sections: Fields) -> Fields:
    """The config of a model like a published one; files contain no sampling options."""
    dropped = any(section["dropout"] for section in sections.values())
    sampling = model.sampling | dict(steps=50, eta=0.0) | ({} if dropped else dict(guidance=1.0))
    return lists(
        dict(
            task="diffusion",
            image_size=model.size,
            unet=unet,
            autoencoder=autoencoder,
            conditioning=sections,
            diffusion=model.noise,
            sampling=sampling,
        )
    )


def _unet_part(fields: Fields, prefix: str) -> dict[str, Part]:
    ignored = IGNORED if prefix else f"{IGNORED}|{BUFFERS}"
    return dict(unet=Part("unet", fields, "compvis", prefix, ignored))


def _check_given(sections: Fields, unet: Fields) -> None:
    """Raises ValueError if the UNet needs an input that nothing in the file provides."""
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
    parts, sections = {}, {}
    for kind, prefix in found:
        shapes = Shapes(state, prefix)
        if kind in ("clip", "openclip"):
            name, sections[name], parts[name] = _clip(kind, shapes, embedders)
        else:
            makers = {"bert": _bert, "class": _class, "rescaler": _rescaler}
            name, sections[name], parts[name] = makers[kind](shapes)
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
    model = find_family(fields, sections, stage["kind"])
    fields |= model.heads
    if "text_2" in sections:
        pooled = sections["text_2"]["network"]["projection"]
        where = f"{UNET}label_emb.0.0.weight"
        sections["sizes"] = _sizes(fields.get("adm_in_channels", 0), pooled, where)
    sections |= brought_sections(model, fields)
    _check_given(sections, fields)
    model = _as_output_means(model, state)
    schedule = schedule_section(state, model.noise["schedule"])
    model = replace(model, noise=model.noise | dict(schedule=schedule))
    scaled = dict(stage, scale_factor=_scale(state, model.autoencoder.scale))
    config = _config(model, fields, scaled, sections)
    parts |= _unet_part(fields, UNET)
    parts["autoencoder"] = Part("autoencoder", stage, "compvis", STAGE)
    inpainting = "masked_image" in sections and "masked_image" not in model.conditions
    return Recognised(model.title + (" inpainting" if inpainting else ""), config, parts)


# Text encoders by themselves, by a tensor that only this kind has.
TEXTS = {
    "clip": r"(.*?)(?:text_model\.)?embeddings\.token_embedding\.weight",
    "openclip": r"(.*?)token_embedding\.weight",
}


def _text_alone(state: State, kind: str, prefix: str) -> Recognised:
    _, section, part = _clip(kind, Shapes(state, prefix), 0)
    if kind == "clip" and section["network"]["width"] in (1024, 1280):
        # OpenCLIP's H and bigG in transformers' form, which SD 2 and SDXL have.
        section |= dict(padding="zero")
        section["network"] |= dict(activation="gelu")
    config = dict(task="text", conditioning=dict(text=section))
    return Recognised("text encoder", config, dict(text=part))


def _lacks(state: State) -> str | None:
    """The missing and the existing parts of a file with a UNet: part of a sentence."""
    shapes, kinds = Shapes(state), [kind for kind, _ in _conditioners(state)]
    stage = any(name.startswith(STAGE) for name in state)
    fields = unet_fields(Shapes(state, UNET))
    width = fields.get("context_dim")
    tokens = rf"{_SLOT}\..*token_embedding\.weight"
    held = sum(shape[1] for name, shape in shapes.items() if re.fullmatch(tokens, name))
    # Retrieval-augmented diffusion, with 16 channels, is conditioned by the caller's array.
    texts = width is None or fields["in_channels"] == 16 or bool(kinds) and not 0 < held < width
    if stage and texts:
        return None
    beside = ["an autoencoder"] * stage + [f"{kind} conditioner" for kind in kinds]
    lacking = [f"no autoencoder ({STAGE}*): add autoencoder=PATH"] * (not stage)
    lacking += [
        f"no text encoders that make a context {width} wide (cond_stage_model.* or conditioner.*): "
        "add text=PATH"
    ] * (not texts)
    return f"holds {' and '.join(['a UNet', *beside])}, but {', and '.join(lacking)}"


def recognise(state: State) -> Recognised:
    """The content of a single file: a model, or an autoencoder, a UNet or a text encoder alone.

    The latter have the tasks "autoencoder", "unet" and "text", and may have any prefix. Of `state`,
    the file's tensors, only the shapes are used, and the values of a few buffers.

    Raises ValueError, which says what was expected and what was found.
    """
    if f"{UNET}input_blocks.0.0.weight" in state:
        if lacking := _lacks(state):
            if any(name.startswith(STAGE) for name in state) or _conditioners(state):
                raise ValueError(lacking)
            return _unet_alone(state, UNET)
        return _whole_model(state)
    if "input_blocks.0.0.weight" in state and "input_hint_block.0.weight" not in state:
        return _unet_alone(state, "")
    for name in state:
        place = name.removesuffix("encoder.conv_in.weight")
        if place != name and f"{place}encoder.down.0.block.0.conv1.weight" in state:
            return _autoencoder_alone(state, place)
    for pattern, what in OTHERS.items():
        name = next((name for name in state if re.match(pattern, name)), None)
        if name:
            raise ValueError(f"is {what} (it has {name})")
    for kind, pattern in TEXTS.items():
        for name in state:
            if match := re.fullmatch(pattern, name):
                return _text_alone(state, kind, match[1])
    some = ", ".join(list(state)[:3])
    raise ValueError(
        f"is no model in CompVis' or SGM's layout: looked for {UNET}input_blocks.* and {STAGE}*, "
        "for an autoencoder's encoder.down.*, a UNet's input_blocks.* or a text encoder's "
        f"token_embedding; found {len(state)} tensors, such as {some}"
    )
