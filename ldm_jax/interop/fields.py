"""The fields of a network, from the names and shapes of its tensors in CompVis' layout.

All but what no shape tells: a UNet's heads, an autoencoder's `scale_factor`, what was only for
training. `canonical` brings fields to a form in which equal ones are equal networks.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_jax.models.build import make_autoencoder, tuples
from ldm_jax.models.unet import UNet

State = Mapping[str, np.ndarray]


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
        """How many there are of what a pattern's group numbers from 0."""
        found = [int(match[1]) for name in self if (match := re.match(pattern, name))]
        return max(found, default=-1) + 1


def _same(values: set, prefix: str, what: str) -> Any:
    if len(values) != 1:
        raise ValueError(f"{prefix}*: {what} of {sorted(values)}, where a UNet has one")
    return values.pop()


def unet_fields(shapes: Shapes, context: int | None = None) -> dict[str, Any]:
    """The fields of a UNet but its heads.

    `context`, where the conditioners tell it, settles what is open if every attention is as wide as
    the context. Raises ValueError for a network that is none of ours, with the tensor that shows.
    """
    width, inputs = shapes["input_blocks.0.0.weight"][:2]
    # A level's way up ends in a convolution, or a second ResBlock, after the attention if any.
    ends = r"output_blocks\.(\d+)\.[12]\.(?P<kind>conv|in_layers\.0)\.weight"
    ups = {int(m[1]): m["kind"] for name in shapes if (m := re.fullmatch(ends, name))}
    levels, blocks = len(ups) + 1, shapes.count(r"output_blocks\.(\d+)\.")
    each = blocks // levels
    if each < 2 or sorted(ups) != [each * (i + 1) - 1 for i in range(levels - 1)]:
        raise ValueError(f"{shapes.prefix}output_blocks: {blocks} blocks, ups at {sorted(ups)}")
    firsts = [f"input_blocks.{1 + level * each}" for level in range(levels)]
    widths = [shapes[f"{first}.0.out_layers.3.weight"][0] for first in firsts]
    attends = [f"{first}.1.norm.weight" in shapes for first in firsts]
    if any(w % width for w in widths):
        raise ValueError(
            f"{shapes.prefix}input_blocks: widths {widths} are no multiples of {width}"
        )
    fields = dict(
        in_channels=inputs,
        out_channels=shapes["out.2.weight"][0],
        model_channels=width,
        channel_mult=[w // width for w in widths],
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
    return fields


def _transformer_fields(
    shapes: Shapes, widths: list[int], places: dict[int, str], context: int | None
) -> dict[str, Any]:
    """What only attention to a context has; `places` of it by level, besides the middle."""
    everywhere = [*((widths[i], place) for i, place in places.items())]
    everywhere.append((widths[-1], "middle_block.1"))

    def key(place: str, attention: str) -> int:
        return shapes[f"{place}.transformer_blocks.0.{attention}.to_k.weight"][1]

    told = {key(place, "attn2") for own, place in everywhere if key(place, "attn2") != own}
    # Where attention is as wide as the channels, as in SGM's toys, it is to the picture itself.
    context = _same(told, shapes.prefix, "contexts") if told else context
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
    # Where the level is as wide as the context this cannot be told; SD 2's upscaler has it there.
    disabled = [i in places and key(places[i], "attn1") != w for i, w in enumerate(widths)]
    fields: dict[str, Any] = dict(context_dim=context)
    if set(depth.values()) != {1}:
        fields["transformer_depth"] = middle if len(set(depth.values())) == 1 else depths
    if "label_emb.0.0.weight" in shapes or context is None:
        fields["use_spatial_transformer"] = True
    if any(disabled):
        fields["disable_self_attentions"] = disabled
    if len(shapes["middle_block.1.proj_in.weight"]) == 2:
        fields["use_linear_in_transformer"] = True
    return fields


def _label_fields(shapes: Shapes) -> dict[str, Any]:
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


def autoencoder_fields(shapes: Shapes) -> dict[str, Any]:
    """The fields of an autoencoder, with its `kind`, but `scale_factor`. Raises ValueError."""
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
        ch_mult=[w // ch for w in widths],
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


def text_fields(kind: str, shapes: Shapes) -> dict[str, Any]:
    """The fields of a text encoder, "clip", "openclip" or "bert", whose names begin as its own.

    Every published one has 64 channels a head. Raises ValueError.
    """
    if kind == "bert":
        vocabulary, width = shapes["token_emb.weight"]
        return dict(
            vocab_size=vocabulary,
            width=width,
            depth=shapes.count(r"attn_layers\.layers\.(\d+)\.") // 2,
            heads=max(1, shapes["attn_layers.layers.0.1.to_q.weight"][0] // 64),
            head_dim=min(64, shapes["attn_layers.layers.0.1.to_q.weight"][0]),
            max_length=shapes["pos_emb.emb.weight"][0],
        )
    if kind == "clip":
        base = "text_model." if "text_model.embeddings.token_embedding.weight" in shapes else ""
        tokens, positions = f"{base}embeddings.token_embedding.weight", "position_embedding.weight"
        positions, blocks = f"{base}embeddings.{positions}", r"(?:text_model\.)?encoder\.layers"
    else:
        tokens, positions = "token_embedding.weight", "positional_embedding"
        blocks = r"transformer\.resblocks"
    vocabulary, width = shapes[tokens]
    return dict(
        vocab_size=vocabulary,
        width=width,
        depth=shapes.count(blocks + r"\.(\d+)\."),
        heads=max(1, width // 64),
        max_length=shapes[positions][0],
        activation="quick_gelu" if kind == "clip" else "gelu",
        projection=None,
        layer="last",
        final_norm=True,
        eos=None,
    )


def canonical_unet(fields: dict[str, Any]) -> dict[str, Any]:
    """All fields of a UNet, with those that mean nothing brought to one form.

    Attention stands at levels that exist, and only there do depths, heads and self-attention count;
    heads become their number at each level; dropout is for training.
    """
    unet = UNet(**tuples(fields))
    levels = range(len(unet.channel_mult))
    attends = [2**i in unet.attention_resolutions for i in levels]
    size, kept = unet.num_head_channels, {}
    for name in UNet.__dataclass_fields__:
        kept[name] = getattr(unet, name)

    def at(name: str, places: list[bool], empty: Any) -> tuple:
        value = kept[name]
        value = value if isinstance(value, tuple) else (value,) * len(levels)
        return tuple(v if there else empty for v, there in zip(value, places, strict=True))

    deep = [*attends[:-1], True]  # the middle's depth is the last level's
    widths = [mult * unet.model_channels for mult in unet.channel_mult]
    heads = [w // size if size > 0 else unet.num_heads for w in widths]
    spatial = unet.context_dim is not None or unet.use_spatial_transformer
    kept |= dict(
        attention_resolutions=tuple(2**i for i in levels if attends[i]),
        transformer_depth=at("transformer_depth", deep, 0) if spatial else 0,
        disable_self_attentions=at("disable_self_attentions", attends, False) if spatial else (),
        num_heads=tuple(n if there else 0 for n, there in zip(heads, deep, strict=True)),
        use_spatial_transformer=spatial,
        resblock_updown=unet.resblock_updown and len(levels) > 1,
    )
    for name in ("num_head_channels", "dropout", "dtype", "param_dtype", "name", "parent"):
        kept.pop(name, None)
    return kept


def canonical_autoencoder(fields: dict[str, Any]) -> dict[str, Any]:
    """All fields of an autoencoder with its kind; attention by level, nothing that only trains."""
    module = make_autoencoder(fields)
    kept = {name: getattr(module, name) for name in type(module).__dataclass_fields__}
    if "attn_resolutions" in kept:
        levels = range(len(module.ch_mult))
        sides = [module.resolution // 2**i for i in levels]
        kept["attn_resolutions"] = tuple(i for i in levels if sides[i] in module.attn_resolutions)
    for name in (
        "resolution",
        "dropout",
        "beta",
        "legacy",
        "dtype",
        "param_dtype",
        "name",
        "parent",
    ):
        kept.pop(name, None)
    if "scale_factor" in kept:  # as files hold it
        kept["scale_factor"] = float(np.float32(kept["scale_factor"]))
    return kept | dict(kind=fields.get("kind", "kl"))
