"""The fields of a network, from the names and shapes of its tensors in CompVis' layout.

All except those that no shape determines: a UNet's heads, an autoencoder's `scale_factor`, options
of training. `canonical` brings fields to a form in which equal networks have equal fields.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from ldm_jax.models.build import make_autoencoder, tuples
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.embedders import ClassEmbedder, Patches, SpatialRescaler
from ldm_jax.models.layers import level_widths
from ldm_jax.models.text import TextTransformer
from ldm_jax.models.unet import UNet
from ldm_jax.published import clip_network

State = Mapping[str, np.ndarray]
Fields = dict[str, Any]


class Shapes(dict):
    """Name, less a prefix, → shape, of the tensors under that prefix; a missing one is an error."""

    def __init__(self, state: State, prefix: str = ""):
        shape = getattr(state, "shape", lambda name: state[name].shape)
        super().__init__(
            (name.removeprefix(prefix), tuple(shape(name)))
            for name in state
            if name.startswith(prefix)
        )
        self.prefix = prefix

    def __missing__(self, name: str):
        raise ValueError(f"lacks the tensor {self.prefix}{name}")

    def count(self, pattern: str) -> int:
        """The number of items that a pattern's group numbers from 0."""
        found = [int(match[1]) for name in self if (match := re.match(pattern, name))]
        return max(found, default=-1) + 1


def _same(values: set, prefix: str, what: str) -> Any:
    if len(values) != 1:
        raise ValueError(f"{prefix}*: {what} of {sorted(values)}, where a UNet has one")
    return values.pop()


def _multiples(widths: list[int], base: int) -> list[float]:
    return [width / base if width % base else width // base for width in widths]


def unet_fields(shapes: Shapes, context: int | None = None) -> Fields:
    """The fields of a UNet except its heads.

    `context` is the conditioners' width, if known: if every attention has that width, no shape
    determines whether it has a context. Raises ValueError for an unsupported network, with the
    tensor that shows it.
    """
    first, inputs = shapes["input_blocks.0.0.weight"][:2]
    width = shapes["time_embed.0.weight"][1]
    # Upsampling after a level is a convolution, or a second ResBlock, after the attention if any.
    ends = r"output_blocks\.(\d+)\.[12]\.(?P<kind>conv|in_layers\.0)\.weight"
    ups = {int(m[1]): m["kind"] for name in shapes if (m := re.fullmatch(ends, name))}
    levels, blocks = len(ups) + 1, shapes.count(r"output_blocks\.(\d+)\.")
    each = blocks // levels
    if each < 2 or sorted(ups) != [each * (i + 1) - 1 for i in range(levels - 1)]:
        raise ValueError(f"{shapes.prefix}output_blocks: {blocks} blocks, ups at {sorted(ups)}")
    firsts = [f"input_blocks.{1 + level * each}" for level in range(levels)]
    widths = [shapes[f"{first}.0.out_layers.3.weight"][0] for first in firsts]
    attends = [f"{first}.1.norm.weight" in shapes for first in firsts]
    if first != widths[0]:
        raise ValueError(
            f"{shapes.prefix}input_blocks.0.0.weight: {first} channels, the first level {widths[0]}"
        )
    fields = dict(
        in_channels=inputs,
        out_channels=shapes["out.2.weight"][0],
        model_channels=width,
        channel_mult=_multiples(widths, width),
        num_res_blocks=each - 1,
        attention_resolutions=[2**i for i in reversed(range(levels)) if attends[i]],
    )
    if "middle_block.1.qkv.weight" not in shapes:
        places = {i: f"{first}.1" for i, first in enumerate(firsts) if attends[i]}
        fields |= _transformer_fields(shapes, widths, places, context)
    fields |= _label_fields(shapes)
    if shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * widths[0]:
        fields["use_scale_shift_norm"] = True
    if "in_layers.0" in ups.values():
        fields["resblock_updown"] = True
    if "time_embed.cond_proj.weight" in shapes:
        fields["time_cond_proj_dim"] = shapes["time_embed.cond_proj.weight"][1]
    return fields


def _transformer_fields(
    shapes: Shapes, widths: list[int], places: dict[int, str], context: int | None
) -> Fields:
    """The fields of attention to a context; its `places` by level, besides the middle."""
    everywhere = [*((widths[i], place) for i, place in places.items())]
    everywhere.append((widths[-1], "middle_block.1"))

    def key(place: str, attention: str) -> int:
        return shapes[f"{place}.transformer_blocks.0.{attention}.to_k.weight"][1]

    # If attention is as wide as the channels, as in SGM's toy models, it is self-attention.
    others = {key(place, "attn2") for own, place in everywhere if key(place, "attn2") != own}
    context = _same(others, shapes.prefix, "contexts") if others else context
    depth = {
        place: shapes.count(re.escape(place) + r"\.transformer_blocks\.(\d+)\.")
        for _, place in everywhere
    }
    middle, last = depth["middle_block.1"], len(widths) - 1
    depths = [depth[places[i]] if i in places else 1 for i in range(last + 1)]
    if last in places and depths[last] != middle:
        raise ValueError(
            f"{shapes.prefix}middle_block.1: {middle} transformer blocks, the last level "
            f"{depths[last]}; here both have as many"
        )
    depths[last] = middle
    if key("middle_block.1", "attn1") != widths[last]:
        raise ValueError(f"{shapes.prefix}middle_block.1 has no self-attention; here it always has")
    # Shapes do not decide at a level as wide as the context; SD 2's upscaler has self-attention.
    disabled = [i in places and key(places[i], "attn1") != w for i, w in enumerate(widths)]
    fields: Fields = dict(context_dim=context)
    if set(depth.values()) != {1}:
        fields["transformer_depth"] = middle if len(set(depth.values())) == 1 else depths
    if "label_emb.0.0.weight" in shapes or context is None:
        fields["use_spatial_transformer"] = True
    if any(disabled):
        fields["disable_self_attentions"] = disabled
    if len(shapes["middle_block.1.proj_in.weight"]) == 2:
        fields["use_linear_in_transformer"] = True
    return fields


def _label_fields(shapes: Shapes) -> Fields:
    if "label_emb.0.0.weight" in shapes:
        vector = shapes["label_emb.0.0.weight"][1]
        return dict(num_classes="sequential", adm_in_channels=vector)
    if "label_emb.1.0.weight" in shapes:
        return dict(num_classes="timestep")
    if "label_emb.bias" in shapes:
        return dict(num_classes="continuous")
    if "label_emb.weight" in shapes:
        return dict(num_classes=shapes["label_emb.weight"][0])
    return {}


def autoencoder_fields(shapes: Shapes) -> Fields:
    """The fields of an autoencoder, with its `kind`, without `scale_factor`. Raises ValueError."""
    ch, inputs = shapes["encoder.conv_in.weight"][:2]
    levels = shapes.count(r"encoder\.down\.(\d+)\.")
    widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    latents = shapes["decoder.conv_in.weight"][1]
    kind = "vq" if "quantize.embedding.weight" in shapes else "kl"
    moments = shapes["encoder.conv_out.weight"][0]
    if moments != latents * (2 if kind == "kl" else 1):
        raise ValueError(f"{shapes.prefix}encoder.conv_out.weight: {moments} for {latents} latents")
    quantised = "post_quant_conv.weight" in shapes
    attends = [256 // 2**i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in shapes]
    fields = dict(
        kind=kind,
        ch=ch,
        ch_mult=_multiples(widths, ch),
        num_res_blocks=shapes.count(r"encoder\.down\.0\.block\.(\d+)\."),
        attn_resolutions=attends,
        in_channels=inputs,
        out_ch=shapes["decoder.conv_out.weight"][0],
        z_channels=latents,
        embed_dim=shapes["post_quant_conv.weight"][1] if quantised else latents,
    )
    if kind == "vq":
        fields["n_embed"] = shapes["quantize.embedding.weight"][0]
    elif not quantised:
        fields["use_quant_conv"] = False
    if "encoder.mid.attn_1.q.weight" not in shapes:
        fields["mid_attn"] = False
    return fields


def text_fields(kind: str, shapes: Shapes) -> Fields:
    """The fields of a text encoder, "clip", "openclip" or "bert", whose names begin as its own.

    Every published one has 64 channels a head. Raises ValueError.
    """
    if kind == "bert":
        vocabulary, width = shapes["token_emb.weight"]
        inner = shapes["attn_layers.layers.0.1.to_q.weight"][0]
        return dict(
            vocab_size=vocabulary,
            width=width,
            depth=shapes.count(r"attn_layers\.layers\.(\d+)\.") // 2,
            heads=max(1, inner // 64),
            head_dim=min(64, inner),
            max_length=shapes["pos_emb.emb.weight"][0],
        )
    base = "text_model." if "text_model.embeddings.token_embedding.weight" in shapes else ""
    names = [f"{base}embeddings.{of}_embedding.weight" for of in ("token", "position")]
    blocks, activation = r"(?:text_model\.)?encoder\.layers\.(\d+)\.", "quick_gelu"
    if kind == "openclip":
        names = ["token_embedding.weight", "positional_embedding"]
        blocks, activation = r"transformer\.resblocks\.(\d+)\.", "gelu"
    (vocabulary, width), (length, _) = (shapes[name] for name in names)
    size = dict(vocab_size=vocabulary, max_length=length)
    return clip_network(width, shapes.count(blocks), max(1, width // 64), activation, **size)


NETWORKS = {
    **dict(clip=CLIPText, text=TextTransformer, transformer=TextTransformer),
    **{"class": ClassEmbedder, "rescaler": SpatialRescaler, "patches": Patches},
}
# Fields of training alone, or of Flax.
_NOT_OF_THE_NETWORK = ("dropout", "remat", "dtype", "param_dtype", "name", "parent")
_OF_TRAINING = ("resolution", "beta", "legacy")


def canonical(config: dict[str, Any]) -> dict[str, Any]:
    """A config, or some sections of one, in a form in which equal networks have equal fields.

    Missing fields get their defaults; fields that do not change the output of a trained model are
    left out. A UNet's heads become their number at each level; depths, heads and self-attention
    count only at levels with attention, and attention only at levels that exist.
    """
    made = dict(config)
    if "unet" in config:
        made["unet"] = _canonical_unet(UNet(**tuples(config["unet"])))
    if "autoencoder" in config:
        made["autoencoder"] = _canonical_autoencoder(config["autoencoder"])
    if "conditioning" in config:
        made["conditioning"] = {n: _canonical_section(s) for n, s in config["conditioning"].items()}
    return made


def _all_fields(module: nn.Module, *without: str) -> Fields:
    names = (name for name in module.__dataclass_fields__ if name not in _NOT_OF_THE_NETWORK)
    return {name: getattr(module, name) for name in names if name not in without}


def _canonical_unet(unet: UNet) -> Fields:
    levels, kept = range(len(unet.channel_mult)), _all_fields(unet, "num_head_channels")
    attends = [2**i in unet.attention_resolutions for i in levels]
    deep = [*attends[:-1], True]  # the middle's depth and heads are the last level's
    if unet.num_head_channels > 0:
        widths = level_widths(unet.model_channels, unet.channel_mult)
        kept["num_heads"] = tuple(width // unet.num_head_channels for width in widths)

    def at(name: str, places: list[bool], empty: Any) -> tuple:
        value = kept[name]
        value = value if isinstance(value, tuple) else (value,) * len(levels)
        return tuple(v if there else empty for v, there in zip(value, places, strict=True))

    spatial = unet.context_dim is not None or unet.use_spatial_transformer
    return kept | dict(
        attention_resolutions=tuple(2**i for i in levels if attends[i]),
        transformer_depth=at("transformer_depth", deep, 0) if spatial else 0,
        disable_self_attentions=at("disable_self_attentions", attends, False) if spatial else (),
        num_heads=at("num_heads", deep, 0),
        use_spatial_transformer=spatial,
        resblock_updown=unet.resblock_updown and len(levels) > 1,
    )


def _canonical_autoencoder(section: Fields) -> Fields:
    module = make_autoencoder(section)
    kept = _all_fields(module, *_OF_TRAINING) | dict(kind=section.get("kind", "kl"))
    if "attn_resolutions" in kept:  # by level
        sides = [module.resolution // 2**i for i in range(len(module.ch_mult))]
        attends = (i for i, side in enumerate(sides) if side in module.attn_resolutions)
        kept["attn_resolutions"] = tuple(attends)
    if "scale_factor" in kept:  # as files hold it
        kept["scale_factor"] = float(np.float32(kept["scale_factor"]))
    return kept


# The defaults of keys of a section of `conditioning`.
_DEFAULTS = dict(tokenizer="byte_pair", context=True, pooled=False, zero_null=False, padding="end")


def _canonical_section(section: Fields) -> Fields:
    section = _DEFAULTS | section | dict(dropout=0.0)
    if fields := dict(section.get("network", {})):
        kind = fields.pop("kind", section["kind"])
        section["network"] = _all_fields(NETWORKS[kind](**tuples(fields)))
    return section
