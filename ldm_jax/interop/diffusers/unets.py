"""The JSON of diffusers' UNets, and our fields: see `components`.

Besides the fields of our UNet, the tables read and write `BESIDE`: `sample_size`, of latents;
`vector`, the module of the UNet's vector (see `layout.slots`); and `addition_time_embed_dim`, the
dimension of the embedding of each number of SDXL's size conditioning. A ControlNet's JSON is that
of its UNet's way down, and of the hint's embedding.
"""

from functools import partial
from typing import Any

from ldm_jax.interop.diffusers.components import (
    ONE,
    VERSION,
    WIDTHS,
    Codec,
    Fields,
    Json,
    Ours,
    Row,
    Rows,
    Table,
    checked,
    choice,
    derived,
    equal,
    passed_over,
    read_fields,
    write_fields,
)
from ldm_jax.models.build import tuples
from ldm_jax.models.layers import level_widths
from ldm_jax.models.unet import UNet

BESIDE = ("sample_size", "vector", "addition_time_embed_dim")
PLAIN, RESNET = "DownBlock2D", "ResnetDownsampleBlock2D"
ATTENDING, CROSSING = "AttnDownBlock2D", "CrossAttnDownBlock2D"


def _up(down: list[str]) -> list[str]:
    return [name.replace("Down", "Up") for name in reversed(down)]


def _down(attending: str, fields: Ours) -> list[str]:
    plain = RESNET if fields.get("resblock_updown") else PLAIN
    places = [2**level for level, _ in enumerate(fields["channel_mult"])]
    return [attending if at in fields["attention_resolutions"] else plain for at in places]


def _bare(names: list[str]) -> list[str]:
    """The last block type without its resizing, as the last block does not resize."""
    last = [name.replace("Resnet", "").replace("sampleBlock", "Block") for name in names[-1:]]
    return names[:-1] + last


def _read_blocks(attending: str, down: list[str], content: Json, fields: Fields) -> None:
    """The levels with attention, and whether ResBlocks resize; `down` is the default."""
    up = content.take("up_block_types", _up(down))
    down = content.take("down_block_types", down)
    known = (PLAIN, RESNET, attending)
    wrong = next((name for name in down if name not in known), None)
    if wrong or len(down) != len(fields["channel_mult"]):
        raise content.error("down_block_types", wrong or down, f"{', '.join(known)} for each width")
    fields["attention_resolutions"] = [2**i for i, name in enumerate(down) if name == attending]
    # Blocks that attend resize as two more keys have it.
    ways = ["conv", "conv"]
    if attending == ATTENDING:
        ways = [content.take(f"{way}sample_type", "conv") for way in ("down", "up")]
    resnet = RESNET in down[:-1] or (attending in down[:-1] and ways[0] == "resnet")
    fields |= dict(resblock_updown=True) if resnet else {}
    ours = _down(attending, fields)
    for key, names, expected, way in (
        ("down_block_types", down, ours, ways[0]),
        ("up_block_types", up, _up(ours), ways[1]),
    ):
        attends = any("Attn" in name for name in expected[:-1])
        same = _bare(names) == _bare(expected)
        if not same or attends and way != ("resnet" if resnet else "conv"):
            raise content.error(key, names, f"{expected}, which all resize alike")


def _write_blocks(attending: str, fields: Ours, content: Fields) -> None:
    down, resnet = _down(attending, fields), fields["resblock_updown"]
    content |= dict(down_block_types=down, up_block_types=_up(down))
    if attending == ATTENDING:
        kind = "resnet" if resnet else "conv"
        content |= dict(downsample_type=kind, upsample_type=kind)
    elif resnet and attending in down and len(down) > 1:
        raise ValueError("unet.resblock_updown with cross-attention at a level that resizes")


def _places(fields: Ours) -> dict[int, int]:
    """Level → width, for levels with attention. The middle counts as the last level."""
    widths = level_widths(fields["model_channels"], fields["channel_mult"])
    last, attends = len(widths) - 1, fields["attention_resolutions"]
    return {i: width for i, width in enumerate(widths) if i == last or 2**i in attends}


def _read_heads(given: Any, fields: Ours) -> tuple[Any, int | None]:
    heads = given if isinstance(given, list) else [given] * len(fields["channel_mult"])
    places = _places(fields)
    sizes, rest = zip(*(divmod(width, heads[i]) for i, width in places.items()), strict=True)
    if any(rest) or len(heads) != len(fields["channel_mult"]):
        raise ValueError
    if isinstance(given, list) and len({*sizes}) == 1:
        return None, sizes[0]
    same = {heads[i] for i in places}
    return (same.pop() if len(same) == 1 else heads), None


def _write_heads(ours: tuple[Any, int], fields: Ours) -> Any:
    heads, size = ours
    widths = level_widths(fields["model_channels"], fields["channel_mult"])
    return [max(1, width // size) for width in widths] if size > 0 else heads


def _read_size(size: int | None, fields: Ours) -> tuple[int | None, int | None]:
    """Of UNet2DModel's heads; without a size there is one."""
    if size and any(width % size for width in _places(fields).values()):
        raise ValueError
    return (None, size) if size else (1, None)


def _write_size(ours: tuple[Any, int], fields: Ours) -> int | None:
    heads, size = ours
    counts = heads if isinstance(heads, tuple) else [heads] * len(fields["channel_mult"])
    sizes = {size} if size > 0 else {w // counts[i] for i, w in _places(fields).items()}
    if len(sizes) > 1 and heads != 1:
        raise ValueError(
            f"unet.num_heads={heads} at widths {[*_places(fields).values()]}, where UNet2DModel "
            "needs the same number of channels in every head"
        )
    return None if len(sizes) > 1 else sizes.pop()


# UNet2DConditionModel's `attention_head_dim` is, in spite of its name, the number of heads.
_HEADS = Codec(_read_heads, _write_heads, "heads that divide the width, for each level")
_SIZE = Codec(_read_size, _write_size, "a number that divides the widths that attend")
EMBEDDED = ("class_embed_type", "addition_embed_type")
# Values of these keys → num_classes, and the module of the vector.
LABELS = {
    (None, None): (None, "class_embedding"),
    ("timestep", None): ("timestep", "class_embedding"),
    ("simple_projection", None): ("continuous", "class_embedding"),
    ("projection", None): ("sequential", "class_embedding"),
    (None, "text_time"): ("sequential", "add_embedding"),
}
_SIZES = ("num_class_embeds", "projection_class_embeddings_input_dim", "addition_time_embed_dim")


def _read_labels(content: Json, fields: Fields) -> None:
    kinds = tuple(content.take(key) for key in EMBEDDED)
    count, width, dim = (content.take(key) for key in _SIZES)
    kind, fields["vector"] = LABELS.get(kinds, ("", ""))
    numbers = fields["vector"] == "add_embedding"
    alone = kind == "continuous" and width != 1 or numbers and not dim
    if kind == "" or kind and count or alone:
        key, value = next((k, v) for k, v in zip(EMBEDDED, kinds, strict=True) if v)
        known = "'timestep', 'projection', 'simple_projection' of 1 number"
        raise content.error(key, value, f"only one of {known}, 'text_time' with its dimension")
    found = dict(num_classes=kind or count, adm_in_channels=width if kind == "sequential" else None)
    found |= dict(addition_time_embed_dim=dim if numbers else None)
    fields |= {name: value for name, value in found.items() if value is not None}


def _write_labels(fields: Ours, content: Fields) -> None:
    kind, vector = fields["num_classes"], fields["vector"]
    kinds = {of: key for key, of in LABELS.items()}
    kinds = kinds.get((kind, vector), kinds.get((kind, "class_embedding"), (None, None)))
    width = {"sequential": fields["adm_in_channels"], "continuous": 1}.get(kind)
    dim = fields["addition_time_embed_dim"] if kinds[1] else None
    values = (*kinds, kind if isinstance(kind, int) else None, width, dim)
    pairs = zip((*EMBEDDED, *_SIZES), values, strict=True)
    content |= {key: value for key, value in pairs if value is not None}


def _read_norms(groups: int | None, fields: Ours) -> None:
    """Groups of attention; by default none with `scale_shift`, else as many as other norms."""
    same = fields.get("groups", 32)
    if (groups or (None if fields.get("use_scale_shift_norm") else same)) != same:
        raise ValueError


def _depths(depths: Any, _: Ours) -> Any:
    if not all(isinstance(depth, int) for depth in (depths if isinstance(depths, list) else [1])):
        raise ValueError
    return depths


_NORMS = Codec(_read_norms, lambda _, fields: fields["groups"], "norm_num_groups")
_SIDE = Codec(lambda side, fields: equal(side, fields) or 64, expected="one side, of a square")
_TIME = derived(lambda fields: 4 * fields["model_channels"], "4 times the first width")
_SHIFT = choice({"default": False, "scale_shift": True})


def _table(ends: int, widths: list[int], down: list[str], heads: Codec, *own: Row | Rows) -> Table:
    """The rows of both classes, with the defaults of one and with its own rows."""
    attending = next(name for name in down if "Attn" in name)
    ours = ("model_channels", "channel_mult")
    return (
        *checked(act_fn=("silu", "swish"), norm_eps=1e-5, flip_sin_to_cos=True, freq_shift=0),
        *checked(downsample_padding=1, mid_block_scale_factor=1, center_input_sample=(None, False)),
        *checked(time_embedding_type="positional"),
        Row("sample_size", "sample_size", 64, _SIDE),
        Row("in_channels", "in_channels", ends),
        Row("out_channels", "out_channels", ends),
        Row(ours, "block_out_channels", widths, WIDTHS),
        Row("", "time_embedding_dim", None, _TIME),
        Row("num_res_blocks", "layers_per_block", 2, ONE),
        Rows(partial(_read_blocks, attending, down), partial(_write_blocks, attending)),
        Row(("num_heads", "num_head_channels"), "attention_head_dim", 8, heads, unless=None),
        Row("use_scale_shift_norm", "resnet_time_scale_shift", "default", _SHIFT, unless=False),
        Row("groups", "norm_num_groups", 32, unless=32),
        Row("dropout", "dropout", 0.0, unless=0.0),
        Rows(_read_labels, _write_labels),
        *own,
    )


_OFF = (
    *("dual_cross_attention", "encoder_hid_dim", "encoder_hid_dim_type", "class_embeddings_concat"),
    *("cross_attention_norm", "num_attention_heads", "resnet_skip_time_act", "timestep_post_act"),
    *("reverse_transformer_layers_per_block", "time_embedding_act_fn"),
)
UNETS = {
    "UNet2DConditionModel": _table(
        4,
        [320, 640, 1280, 1280],
        [CROSSING] * 3 + [PLAIN],
        _HEADS,
        *checked(mid_block_type="UNetMidBlock2DCrossAttn", attention_type="default"),
        *checked(resnet_out_scale_factor=1.0, conv_in_kernel=3, conv_out_kernel=3),
        *checked(**dict.fromkeys(_OFF, (None, False))),
        # The side of attention that is computed in float32; keys of other kinds of middle blocks
        # and added embeddings.
        *passed_over("upcast_attention", "mid_block_only_cross_attention"),
        *passed_over("addition_embed_type_num_heads"),
        Row("context_dim", "cross_attention_dim", 1280, ONE),
        Row(
            "transformer_depth",
            "transformer_layers_per_block",
            1,
            Codec(_depths, expected="a number for each level"),
            unless=1,
        ),
        Row("disable_self_attentions", "only_cross_attention", False, unless=False),
        Row("use_linear_in_transformer", "use_linear_projection", False, unless=False),
        Row("time_cond_proj_dim", "time_cond_proj_dim", None, unless=None),
    ),
    "UNet2DModel": _table(
        3,
        [224, 448, 672, 896],
        [PLAIN] + [ATTENDING] * 3,
        _SIZE,
        *checked(mid_block_type="UNetMidBlock2D", add_attention=True),
        *passed_over("num_train_timesteps"),  # only of a learned embedding of the time
        Row("", "attn_norm_num_groups", None, _NORMS),
    ),
}
# A ControlNet has the keys of its UNet that are in `_DOWN`, of the same meanings and defaults.
CONTROL = "ControlNetModel"
_HINT: Table = (
    *checked(global_pool_conditions=False),
    Row("hint_in", "conditioning_channels", 3),
    Row("hint_channels", "conditioning_embedding_out_channels", [16, 32, 96, 256]),
    Row("bgr", "controlnet_conditioning_channel_order", "rgb", choice({"rgb": False, "bgr": True})),
)
_DOWN = (
    *("in_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "mid_block_type"),
    *("only_cross_attention", "block_out_channels", "layers_per_block", "downsample_padding"),
    *("mid_block_scale_factor", "act_fn", "norm_num_groups", "norm_eps", "cross_attention_dim"),
    *("transformer_layers_per_block", "attention_head_dim", "use_linear_projection"),
    *("resnet_time_scale_shift", *EMBEDDED, *_SIZES),
)


def control_from(content: Json) -> Fields:
    """The section of a ControlNet: the fields of its module, with those of its UNet in `unet`.

    Raises ValueError for another class than `CONTROL`, or a value that our network cannot express.
    """
    if content.class_name != CONTROL:
        raise content.error("_class_name", content.class_name, repr(CONTROL))
    if isinstance(down := content.left.get("down_block_types"), list):
        content.left["up_block_types"] = _up([*map(str, down)])  # of its UNet
    unet, section = read_fields(content, UNETS["UNet2DConditionModel"]), read_fields(content, _HINT)
    content.done()
    return section | dict(unet={name: v for name, v in unet.items() if name not in BESIDE})


def control_to(section: Fields, **beside: Any) -> Fields:
    """The JSON of a ControlNet; `beside`: `BESIDE`. Raises ValueError as `unet_to`."""
    unet = UNet(**tuples(section["unet"]))
    if unet.context_dim is None or unet.time_cond_proj_dim is not None:
        field = "context_dim=None" if unet.context_dim is None else "time_cond_proj_dim"
        raise ValueError(f"unet.{field}: no ControlNet of diffusers has this")
    about = dict(_class_name=CONTROL, _diffusers_version=VERSION)
    down = write_fields(UNETS["UNet2DConditionModel"], vars(unet) | beside)
    down = {key: value for key, value in down.items() if key in _DOWN}
    return write_fields(_HINT, section, **about, **down)


def unet_from(content: Json) -> tuple[Fields, Fields]:
    """The fields of a UNet of one of the classes `UNETS`, and those of `BESIDE` that it has."""
    fields = read_fields(content, UNETS[content.class_name])
    content.done()
    return fields, {name: fields.pop(name) for name in BESIDE if name in fields}


def unet_to(fields: Fields, **beside: Any) -> Fields:
    """The JSON of a UNet; `beside`: `BESIDE`.

    Raises ValueError, with the field, for what diffusers' classes cannot express.
    """
    unet = UNet(**tuples(fields))
    name = "UNet2DModel" if unet.context_dim is None else "UNet2DConditionModel"
    if unet.context_dim is None:
        for field in ("use_spatial_transformer", "time_cond_proj_dim"):
            if getattr(unet, field):
                raise ValueError(f"unet.{field} without context_dim")
        if unet.num_classes in ("sequential", "continuous"):
            raise ValueError(f"unet.num_classes={unet.num_classes!r} without context_dim")
    about = dict(_class_name=name, _diffusers_version=VERSION)
    return write_fields(UNETS[name], vars(unet) | beside, **about)
