"""The JSON of diffusers' UNets, as fields of ours, and back."""

from typing import Any

from ldm_jax.interop.diffusers.components import VERSION, Json, multiples
from ldm_jax.models.build import tuples
from ldm_jax.models.unet import UNet

# Name of a block on the way down → on the way up, whether it attends, how it resizes.
BLOCKS = {
    "DownBlock2D": ("UpBlock2D", False, "conv"),
    "ResnetDownsampleBlock2D": ("ResnetUpsampleBlock2D", False, "resnet"),
    "CrossAttnDownBlock2D": ("CrossAttnUpBlock2D", True, "conv"),
    "AttnDownBlock2D": ("AttnUpBlock2D", True, None),  # by `downsample_type`
}
UNETS = {
    "UNet2DConditionModel": dict(
        ends=4,
        widths=[320, 640, 1280, 1280],
        down=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        attends="CrossAttnDownBlock2D",
    ),
    "UNet2DModel": dict(
        ends=3,
        widths=[224, 448, 672, 896],
        down=["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
        up=["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
        attends="AttnDownBlock2D",
    ),
}


def _levels(json: Json, default: dict[str, Any]) -> tuple[list[bool], bool]:
    """Which levels attend, and whether ResBlocks change the size."""
    down = json.take("down_block_types", default["down"])
    up = json.take("up_block_types", default["up"])
    attending = default["attends"]
    known = ["DownBlock2D", "ResnetDownsampleBlock2D", attending]
    for name in down:
        if name not in known:
            raise json.error("down_block_types", name, " or ".join(known))
    kinds = ("conv", "resnet") if attending == "AttnDownBlock2D" else ("conv",)
    ways = [json.take(f"{way}sample_type", "conv") for way in ("down", "up")]
    for way, kind in zip(("down", "up"), ways, strict=True):
        if kind not in kinds:
            raise json.error(f"{way}sample_type", kind, " or ".join(kinds))
    backwards = {after: name for name, (after, *_) in BLOCKS.items()}
    mirrored = [backwards.get(name, name) for name in reversed(up)]
    attends = [BLOCKS[name][1] for name in down]
    resizes = {BLOCKS[name][2] or ways[0] for name in down[:-1]}
    resizes |= {BLOCKS[name][2] or ways[1] for name in mirrored[1:] if name in BLOCKS}
    if len(resizes) > 1 or any(name not in known for name in mirrored) or len(up) != len(down):
        raise json.error("up_block_types", up, f"the counterparts of {down}, all sized alike")
    if [BLOCKS[name][1] for name in mirrored] != attends:
        raise json.error("up_block_types", up, f"attention at the levels of {down}")
    return attends, resizes == {"resnet"}


def _heads(json: Json, widths: list[int], attends: list[bool]) -> dict[str, int]:
    """Of UNet2DConditionModel, whose `attention_head_dim` is, in spite of its name, how many."""
    heads = json.take("attention_head_dim", 8)
    if isinstance(heads, int):
        return dict(num_heads=heads)
    if not isinstance(heads, list) or len(heads) != len(widths):
        raise json.error("attention_head_dim", heads, f"a number, or {len(widths)}")
    # The middle has as many as the last level.
    pairs = [(w, n) for w, n, a in zip(widths, heads, [*attends[:-1], True], strict=True) if a]
    for field, values in (
        ("num_head_channels", {w // n for w, n in pairs}),
        ("num_heads", {n for _, n in pairs}),
    ):
        if len(values) == 1:
            return {field: values.pop()}
    raise json.error("attention_head_dim", heads, "as many channels a head, or heads, everywhere")


def _labels(json: Json) -> tuple[dict[str, Any], str]:
    """Fields, and where the UNet takes a vector in."""
    kind, added = json.take("class_embed_type"), json.take("addition_embed_type")
    classes = json.take("num_class_embeds")
    width = json.take("projection_class_embeddings_input_dim")
    json.take("addition_embed_type_num_heads")  # of other types than "text_time"
    size = json.take("addition_time_embed_dim")
    if added is not None:
        if added != "text_time" or kind is not None or classes is not None:
            raise json.error("addition_embed_type", added, "'text_time', and no class embedding")
        if size != 256:
            raise json.error("addition_time_embed_dim", size, "256")
        return dict(num_classes="sequential", adm_in_channels=width), "add_embedding"
    if kind is None:
        fields = {} if classes is None else dict(num_classes=classes)
    elif kind == "timestep":
        fields = dict(num_classes="timestep")
    elif kind == "projection":
        fields = dict(num_classes="sequential", adm_in_channels=width)
    elif kind == "simple_projection" and width == 1:
        fields = dict(num_classes="continuous")
    else:
        raise json.error("class_embed_type", kind, "None, 'timestep' or 'projection'")
    return fields, "class_embedding"


def unet_from(json: Json) -> tuple[dict[str, Any], int, str]:
    """A UNet2DConditionModel or UNet2DModel: fields of a UNet, `sample_size`, and where it takes a
    vector in (see `layout.slots`)."""
    default = UNETS[json.class_name]
    with_context = json.class_name == "UNet2DConditionModel"
    widths = json.take("block_out_channels", default["widths"])
    attends, resnet = _levels(json, default)
    levels = len(widths)
    if len(attends) != levels:
        raise json.error("block_out_channels", widths, f"one for each of {len(attends)} blocks")
    groups = json.take("norm_num_groups", 32)
    shift = json.take("resnet_time_scale_shift", "default")
    if shift not in ("default", "scale_shift"):
        raise json.error("resnet_time_scale_shift", shift, "'default' or 'scale_shift'")
    fields: dict[str, Any] = dict(
        in_channels=json.take("in_channels", default["ends"]),
        out_channels=json.take("out_channels", default["ends"]),
        model_channels=widths[0],
        channel_mult=multiples(json, widths),
        num_res_blocks=json.one("layers_per_block", 2, levels),
        attention_resolutions=[2**i for i in reversed(range(levels)) if attends[i]],
    )
    if with_context:
        fields |= _heads(json, widths, attends)
        fields["context_dim"] = json.one("cross_attention_dim", 1280, levels)
        depth = json.take("transformer_layers_per_block", 1)
        if isinstance(depth, list) and not all(isinstance(n, int) for n in depth):
            raise json.error("transformer_layers_per_block", depth, "a number for each level")
        crossed = json.take("only_cross_attention", False)
        fields |= dict(transformer_depth=depth) if depth != 1 else {}
        fields |= dict(disable_self_attentions=crossed) if crossed else {}
        if json.take("use_linear_projection", False):
            fields["use_linear_in_transformer"] = True
        # Which side of attention is computed in float32, and what the kind of middle block that is
        # expected here does not read.
        json.take("upcast_attention")
        json.take("mid_block_only_cross_attention")
        json.expect(
            mid_block_type="UNetMidBlock2DCrossAttn",
            attention_type="default",
            resnet_out_scale_factor=1.0,
            conv_in_kernel=3,
            conv_out_kernel=3,
        )
    else:
        size = json.take("attention_head_dim", 8)
        fields |= dict(num_heads=1) if size is None else dict(num_head_channels=size)
        own = json.take("attn_norm_num_groups")
        if (own or (groups if shift == "default" else None)) != groups:
            raise json.error("attn_norm_num_groups", own, f"norm_num_groups={groups}")
        json.take("num_train_timesteps")  # only of a learned time embedding
        json.expect(mid_block_type="UNetMidBlock2D", add_attention=True)
    labels, vector = _labels(json)
    fields |= labels
    fields |= dict(use_scale_shift_norm=True) if shift == "scale_shift" else {}
    fields |= dict(resblock_updown=True) if resnet else {}
    fields |= dict(groups=groups) if groups != 32 else {}
    dropout = json.take("dropout", 0.0)
    fields |= dict(dropout=dropout) if dropout else {}
    json.expect(
        act_fn=("silu", "swish"),
        norm_eps=1e-5,
        flip_sin_to_cos=True,
        freq_shift=0,
        downsample_padding=1,
        mid_block_scale_factor=1,
        time_embedding_type="positional",
        time_embedding_dim=(None, 4 * widths[0]),
    )
    size = json.one("sample_size", 64, 2) or 64
    json.done()
    return fields, size, vector


def unet_to(fields: dict[str, Any], sample_size: int, vector: str) -> dict[str, Any]:
    """The JSON of a UNet; `vector` says where it takes one in: see `layout.slots`.

    Raises ValueError, with the field, for what diffusers' classes cannot express.
    """
    unet = UNet(**tuples(fields))
    widths = [mult * unet.model_channels for mult in unet.channel_mult]
    attends = [2**i in unet.attention_resolutions for i in range(len(widths))]
    with_context = unet.context_dim is not None
    if unet.use_spatial_transformer and not with_context:
        raise ValueError("unet.use_spatial_transformer without context_dim")
    if with_context and unet.resblock_updown and any(attends[:-1]):
        raise ValueError("unet.resblock_updown with cross-attention ahead of the last level")
    name = "UNet2DConditionModel" if with_context else "UNet2DModel"
    plain = "ResnetDownsampleBlock2D" if unet.resblock_updown else "DownBlock2D"
    down = [UNETS[name]["attends"] if there else plain for there in attends]
    content = dict(
        _class_name=name,
        _diffusers_version=VERSION,
        sample_size=sample_size,
        in_channels=unet.in_channels,
        out_channels=unet.out_channels,
        block_out_channels=widths,
        down_block_types=down,
        up_block_types=[BLOCKS[block][0] for block in reversed(down)],
        layers_per_block=unet.num_res_blocks,
        resnet_time_scale_shift="scale_shift" if unet.use_scale_shift_norm else "default",
        norm_num_groups=unet.groups,
        norm_eps=1e-5,
        act_fn="silu",
        flip_sin_to_cos=True,
        freq_shift=0,
        downsample_padding=1,
        mid_block_scale_factor=1,
        dropout=unet.dropout,
    )
    size, heads = unet.num_head_channels, unet.num_heads
    if with_context:
        depth, crossed = unet.transformer_depth, unet.disable_self_attentions
        content |= dict(
            mid_block_type="UNetMidBlock2DCrossAttn",
            cross_attention_dim=unet.context_dim,
            attention_head_dim=[max(1, w // size) for w in widths] if size > 0 else heads,
            transformer_layers_per_block=list(depth) if isinstance(depth, tuple) else depth,
            only_cross_attention=list(crossed) if isinstance(crossed, tuple) else crossed,
            use_linear_projection=unet.use_linear_in_transformer,
        )
    else:
        places = [w for w, there in zip(widths, [*attends[:-1], True], strict=True) if there]
        sizes = {size} if size > 0 else {w // heads for w in places}
        if len(sizes) > 1 and heads != 1:
            raise ValueError(
                f"unet.num_heads={heads} at widths {places}, where UNet2DModel wants as many "
                "channels in every head"
            )
        content |= dict(
            attention_head_dim=None if len(sizes) > 1 else sizes.pop(),
            attn_norm_num_groups=unet.groups,
            downsample_type="resnet" if unet.resblock_updown else "conv",
            upsample_type="resnet" if unet.resblock_updown else "conv",
        )
    if unet.num_classes == "sequential":
        width = dict(projection_class_embeddings_input_dim=unet.adm_in_channels)
        kinds = dict(addition_embed_type="text_time", addition_time_embed_dim=256)
        content |= width | (
            kinds if vector == "add_embedding" else dict(class_embed_type="projection")
        )
    elif unet.num_classes == "timestep":
        content["class_embed_type"] = "timestep"
    elif unet.num_classes == "continuous":
        content |= dict(
            class_embed_type="simple_projection", projection_class_embeddings_input_dim=1
        )
    elif unet.num_classes is not None:
        content["num_class_embeds"] = unet.num_classes
    if not with_context and unet.num_classes in ("sequential", "continuous"):
        raise ValueError(f"unet.num_classes={unet.num_classes!r} without context_dim")
    return content
