"""The originals' parameters as ours: names, and torch's (out, in, …) layouts.

A family of networks is a list of (pattern, replacement) applied in turn to a dotted torch name;
what comes out, with dots for slashes, is the path of the Flax leaf.
"""

import re
from collections.abc import Callable

import jax
import numpy as np

Rules = list[tuple[str, str | Callable[[re.Match], str]]]

TRANSFORMER: Rules = [
    (r"\bto_out\.0\.", "to_out."),
    (r"\bnet\.0\.proj\.", "proj_in."),
    (r"\bnet\.0\.0\.", "proj_in."),
    (r"\bnet\.2\.", "proj_out."),
]
UNET: Rules = [
    *TRANSFORMER,
    (r"\.(op|conv)\.", "."),  # down- and up-samplers hold nothing but their convolution
    (r"\.(\d+)", r"_\1"),
]
UNET_LABELS: Rules = [(r"^label_emb\.weight", "label_emb.embedding"), *UNET]
AUTOENCODER: Rules = [
    (r"\bembedding\.weight", "embedding.embedding"),  # of a codebook
    (r"^decoder\.conv_out", "conv_out"),
    (r"\b(down|up)\.(\d+)\.(block|attn)\.(\d+)", r"\1_\2_\3_\4"),
    (r"\b(down|up)\.(\d+)\.(downsample|upsample)\.conv", r"\1_\2_\3"),
    (r"\bmid\.", "mid_"),
]


TINY_AUTOENCODER: Rules = [(r"\.(\d+)", r"_\1")]


def diffusers_unet(num_res_blocks: int, attention_on_way_up: tuple[bool, ...]) -> Rules:
    """A UNet2DConditionModel, and at which of its up_blocks there is attention."""

    def down(match: re.Match) -> str:
        level, kind, place = int(match[1]), match[2], int(match[3])
        place = num_res_blocks if kind == "downsamplers" else place
        block = 1 + level * (num_res_blocks + 1) + place
        return f"input_blocks_{block}_{int(kind == 'attentions')}."

    def up(match: re.Match) -> str:
        level, kind, place = int(match[1]), match[2], int(match[3])
        place = num_res_blocks if kind == "upsamplers" else place
        block = level * (num_res_blocks + 1) + place
        layers = ("resnets", "attentions", "upsamplers")
        if not attention_on_way_up[level]:
            layers = ("resnets", "upsamplers")
        return f"output_blocks_{block}_{layers.index(kind)}."

    return [
        (r"(?<=resnets\.\d)\.norm1\.", ".in_layers_0."),
        (r"(?<=resnets\.\d)\.norm2\.", ".out_layers_0."),
        (r"\.conv1\.", ".in_layers_2."),
        (r"\.conv2\.", ".out_layers_3."),
        (r"\.time_emb_proj\.", ".emb_layers_1."),
        (r"\.conv_shortcut\.", ".skip_connection."),
        (r"^down_blocks\.(\d)\.(\w+)\.(\d)\.", down),
        (r"^up_blocks\.(\d)\.(\w+)\.(\d)\.", up),
        (r"^mid_block\.resnets\.(\d)", lambda match: f"middle_block_{2 * int(match[1])}"),
        (r"^mid_block\.attentions\.0", "middle_block_1"),
        (r"\.linear_(\d)", lambda match: f"_{2 * int(match[1]) - 2}"),
        (r"^time_embedding", "time_embed"),
        (r"^add_embedding", "label_emb_0"),
        (r"^class_embedding", "label_emb_1"),
        (r"^conv_in", "input_blocks_0_0"),
        (r"^conv_norm_out", "out_0"),
        (r"^conv_out", "out_2"),
        *UNET,
    ]


def _text_layer(match: re.Match) -> str:
    """Attention and feed-forward are layers of their own there, each (norm, layer)."""
    block, feed_forward = divmod(int(match[1]), 2)
    name = ("attn", "ff")[feed_forward] if match[2] == "1" else f"norm{feed_forward + 1}"
    return f"layers_{block}_{name}"


TEXT: Rules = [
    (r"^token_emb\.weight", "token_emb.embedding"),
    (r"^pos_emb\.emb\.weight", "pos_emb"),
    (r"^attn_layers\.layers\.(\d+)\.([01])", _text_layer),
    *TRANSFORMER,
]


def discriminator(n_layers: int) -> Rules:
    """`main.N`: a convolution and its LeakyReLU, then convolution, norm, LeakyReLU each time."""
    names = {0: "conv_0", 3 * n_layers + 2: "conv_out"}
    for i in range(1, n_layers + 1):
        names |= {3 * i - 1: f"conv_{i}", 3 * i: f"norm_{i}"}
    return [(r"^main\.(\d+)", lambda match: names[int(match[1])])]


VGG_CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def _vgg_convolution(match: re.Match) -> str:
    stage = int(match[1])
    return f"conv{stage}_{VGG_CONVOLUTIONS[stage - 1].index(int(match[2])) + 1}"


LPIPS: Rules = [
    (r"^net\.slice(\d)\.(\d+)", _vgg_convolution),
    (r"^(lin\d)\.model\.1\.weight", r"\1"),
]


def convert(name: str, array: np.ndarray, rules: Rules) -> tuple[str, np.ndarray]:
    """Path (joined by slashes) and value of the Flax leaf that holds one torch parameter."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    if name.endswith(".weight"):
        name = name.removesuffix("weight") + ("scale" if array.ndim == 1 else "kernel")
        if array.ndim > 1:
            array = array.transpose(*range(2, array.ndim), 1, 0)
    return name.replace(".", "/"), array


def joined(path: tuple) -> str:
    return "/".join(key.key for key in path)


def leaves(tree) -> dict[str, jax.Array]:
    """Path joined by slashes → leaf."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {joined(path): leaf for path, leaf in flat}


def to_flax(state: dict[str, np.ndarray], rules: Rules, like):
    """A tree shaped as `like` (arrays or their shapes) from all of a torch network's parameters.

    Raises:
      KeyError: a parameter of one is missing in the other.
      ValueError: the shapes of a parameter differ, by more than 1s (a 1×1 convolution may be a
        matrix here).
    """
    shapes = {path: leaf.shape for path, leaf in leaves(like).items()}
    converted = dict(convert(name, array, rules) for name, array in state.items())
    if len(converted) != len(state) or converted.keys() != shapes.keys():
        raise KeyError(f"only in one of the networks: {sorted(converted.keys() ^ shapes.keys())}")
    for path, array in converted.items():
        here, there = ([n for n in shape if n > 1] for shape in (shapes[path], array.shape))
        if here != there:
            raise ValueError(f"{path} is {shapes[path]} here and {array.shape} there")
        converted[path] = array.reshape(shapes[path])
    return jax.tree.unflatten(jax.tree.structure(like), [converted[path] for path in shapes])
