"""The names of our parameters in other codes, and the layout of their arrays.

`name_of` makes a name from our path, for any of several codes. diffusers' names of UNets and
autoencoders are made from those of CompVis' code. All functions go in one direction; reading
inverts them over the parameters of a model (`layout.slots`). torch stores a matrix as (out, in) and
a convolution as (out, in, height, width), Flax as (in, out) and (height, width, in, out).
"""

import re
from collections.abc import Callable

import numpy as np

Rules = tuple[tuple[str, str | Callable[[re.Match], str]], ...]


def _apply(rules: Rules, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


_LEAVES: Rules = ((r"\.(kernel|scale|embedding)$", ".weight"),)


def _dotted(path: str) -> str:
    return _apply(_LEAVES, path.replace("/", "."))


_TRANSFORMER: Rules = (
    (r"\.to_out\.", ".to_out.0."),
    (r"\.ff\.proj_out\.", ".ff.net.2."),
)
_UNET: Rules = (
    (r"_(\d+)(?=[._])", r".\1"),
    (r"\.ff\.proj_in\.", ".ff.net.0.proj."),
    *_TRANSFORMER,
    # Down- and upsampling are bare convolutions here, and convolutions inside a module there.
    (r"^(input_blocks\.(?!0\.)\d+\.0)\.(?=weight|bias)", r"\1.op."),
    (r"^(output_blocks\.\d+\.\d)\.(?=weight|bias)", r"\1.conv."),
    (r"^time_embed_cond_proj\.", "time_embed.cond_proj."),
)
_CONTROL: Rules = (*_UNET, (r"^input_hint_block\.block\.", "input_hint_block."))
_AUTOENCODER: Rules = (
    (r"^conv_out\.", "decoder.conv_out."),
    (r"\bmid_", "mid."),
    (r"\b(down|up)_(\d+)_(block|attn)_(\d+)\.", r"\1.\2.\3.\4."),
    (r"\b(down|up)_(\d+)_(downsample|upsample)\.", r"\1.\2.\3.conv."),
)
# TAESD's own decoder begins with a layer that clamps; in diffusers it is not in the list.
_TINY: Rules = (
    (r"\bconv_(\d)\.", r"conv.\1."),
    (r"^encoder\.layers_(\d+)\.", r"encoder.\1."),
    (r"^decoder\.layers_(\d+)\.", lambda match: f"decoder.{int(match[1]) + 1}."),
)


def _bert_layer(match: re.Match) -> str:
    """Attention and feed-forward are separate layers there, each (norm, layer)."""
    feed_forward = match[2] in ("ff", "norm2")
    part = 0 if match[2].startswith("norm") else 1
    return f"attn_layers.layers.{2 * int(match[1]) + feed_forward}.{part}."


_BERT: Rules = (
    (r"^pos_emb$", "pos_emb.emb.weight"),
    (r"^layers_(\d+)_(attn|ff|norm1|norm2)\.", _bert_layer),
    (r"^(attn_layers\.layers\.\d*[13579]\.1)\.proj_in\.", r"\1.net.0.0."),
    (r"^(attn_layers\.layers\.\d*[13579]\.1)\.proj_out\.", r"\1.net.2."),
)
_LDM_BERT: Rules = (
    (r"^token_emb\.", "embed_tokens."),
    (r"^pos_emb$", "embed_positions.weight"),
    (r"^layers_(\d+)_norm1\.", r"layers.\1.self_attn_layer_norm."),
    (r"^layers_(\d+)_norm2\.", r"layers.\1.final_layer_norm."),
    (r"^layers_(\d+)_attn\.to_(\w+)\.", r"layers.\1.self_attn.\2_proj."),
    (r"^layers_(\d+)_ff\.proj_in\.", r"layers.\1.fc1."),
    (r"^layers_(\d+)_ff\.proj_out\.", r"layers.\1.fc2."),
    (r"^norm\.", "layer_norm."),
    (r"^", "model."),
)
_CLIP: Rules = (
    (r"^(position_embedding)$", r"\1.weight"),
    (r"^(token_embedding|position_embedding)\.", r"embeddings.\1."),
    (r"^layers_", "encoder.layers."),
    (r"^(?!text_projection)", "text_model."),
)
_OPEN_CLIP: Rules = (
    (r"^position_embedding$", "positional_embedding"),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^layers_(\d+)\.", r"transformer.resblocks.\1."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
)
# By code: CompVis' (with ControlNet's, "control", and LDM's text transformer, "bert"), TAESD's
# ("tiny"), transformers' CLIPTextModel, OpenCLIP's text tower, diffusers' AutoencoderTiny and
# LDMBertModel.
CODES: dict[str, Rules] = {
    "unet": _UNET,
    "control": _CONTROL,
    "autoencoder": _AUTOENCODER,
    "bert": _BERT,
    "class": (),
    "rescaler": (),
    "tiny": _TINY,
    "clip": _CLIP,
    "openclip": _OPEN_CLIP,
    "diffusers_tiny": ((r"\blayers_", "layers."), (r"\bconv_", "conv.")),
    "diffusers_bert": _LDM_BERT,
}


def name_of(code: str, path: str) -> str:
    """The name of our leaf `path` ("a/b/kernel") in a code of `CODES`, without the network's prefix
    in a whole model. OpenCLIP's queries, keys and values share one tensor."""
    return _apply(CODES[code], _dotted(path))


_RESNET: Rules = (
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.(skip_connection|nin_shortcut)\.", ".conv_shortcut."),
)
# Attention without a context is one module, `Attention`, in UNets and autoencoders.
_ATTENTION: Rules = (
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
_OLD_ATTENTION: Rules = (
    (r"(\.attentions\.\d+)\.to_q\.", r"\1.query."),
    (r"(\.attentions\.\d+)\.to_k\.", r"\1.key."),
    (r"(\.attentions\.\d+)\.to_v\.", r"\1.value."),
    (r"(\.attentions\.\d+)\.to_out\.0\.", r"\1.proj_attn."),
)


def diffusers_unet_name(
    name: str, num_res_blocks: int, plain_attention: bool = False, vector: str = "add_embedding"
) -> str:
    """diffusers' name of a UNet's tensor, from CompVis'.

    Args:
      plain_attention: attention without a context, not a transformer (UNet2DModel). CompVis' `qkv`
        is returned unchanged; diffusers has three tensors instead, to_q, to_k and to_v.
      vector: the module of the vector y: "add_embedding" (SDXL) or "class_embedding" (unCLIP).
    """
    per_level = num_res_blocks + 1

    def down(match: re.Match) -> str:
        level, place = divmod(int(match[1]) - 1, per_level)
        if place == num_res_blocks:
            return f"down_blocks.{level}.downsamplers.0.{'conv.' if match[3] else ''}"
        kind = ("resnets", "attentions")[int(match[2])]
        return f"down_blocks.{level}.{kind}.{place}."

    def up(match: re.Match) -> str:
        level, place = divmod(int(match[1]), per_level)
        return f"up_blocks.{level}.{('resnets', 'attentions')[int(match[2])]}.{place}."

    def upsampler(match: re.Match) -> str:
        return f"up_blocks.{int(match[1]) // per_level}.upsamplers.0."

    rules: Rules = (
        (r"^time_embed\.([02])\.", lambda m: f"time_embedding.linear_{int(m[1]) // 2 + 1}."),
        (r"^time_embed\.cond_proj\.", "time_embedding.cond_proj."),
        (r"^label_emb\.0\.([02])\.", lambda m: f"{vector}.linear_{int(m[1]) // 2 + 1}."),
        (r"^label_emb\.1\.([02])\.", lambda m: f"class_embedding.linear_{int(m[1]) // 2 + 1}."),
        (r"^label_emb\.", "class_embedding."),
        (r"^input_blocks\.0\.0\.", "conv_in."),
        (r"^out\.0\.", "conv_norm_out."),
        (r"^out\.2\.", "conv_out."),
        (r"^input_blocks\.(\d+)\.(\d)\.(op\.)?", down),
        # The last module of a level's last block: a convolution or a ResBlock, but no transformer.
        (r"^output_blocks\.(\d+)\.[12]\.(?=conv\.|(?:in|emb|out)_layers|skip_)", upsampler),
        (r"^output_blocks\.(\d+)\.([01])\.", up),
        (r"^middle_block\.0\.", "mid_block.resnets.0."),
        (r"^middle_block\.1\.", "mid_block.attentions.0."),
        (r"^middle_block\.2\.", "mid_block.resnets.1."),
        *_RESNET,
        *(_ATTENTION if plain_attention else ()),
    )
    return _apply(rules, name)


def diffusers_control_name(name: str, widths: int) -> str:
    """diffusers' name of a tensor that a ControlNet has and a UNet has not, from the original's.

    `widths` is the number of `hint_channels`.
    """

    def hint(match: re.Match) -> str:
        i = int(match[1]) // 2
        part = {0: "conv_in", 2 * widths - 1: "conv_out"}.get(i, f"blocks.{i - 1}")
        return f"controlnet_cond_embedding.{part}."

    rules: Rules = (
        (r"^input_hint_block\.(\d+)\.", hint),
        (r"^zero_convs\.(\d+)\.0\.", r"controlnet_down_blocks.\1."),
        (r"^middle_block_out\.0\.", "controlnet_mid_block."),
    )
    return _apply(rules, name)


def t2i_name(path: str, layout: str, num_res_blocks: int, light: bool) -> str:
    """The name of a T2I-Adapter's leaf `path` in diffusers' layout, without "adapter.", or in the
    original, "compvis", which counts residual blocks through all levels unless it is `light`."""
    name = re.sub(r"_(\d+)_", r".\1.", _dotted(path))
    if layout == "diffusers":
        return name
    if light:
        return name.replace(".resnets.", ".body.")

    def counted(match: re.Match) -> str:
        return f"body.{int(match[1]) * num_res_blocks + int(match[2] or 0)}."

    return re.sub(r"^body\.(\d+)\.(?:resnets\.(\d+)\.)?", counted, name)


def diffusers_autoencoder_name(name: str, levels: int) -> str:
    """diffusers' name of an autoencoder's tensor, from CompVis'; decoders count from the top."""

    def up(match: re.Match) -> str:
        return f"up_blocks.{levels - 1 - int(match[1])}.{match[2]}"

    rules: Rules = (
        (r"\bdown\.(\d+)\.", r"down_blocks.\1."),
        (r"\bup\.(\d+)\.(.)", up),
        (r"\.block\.(\d+)\.", r".resnets.\1."),
        (r"\.attn\.(\d+)\.", r".attentions.\1."),
        (r"\.(downsample|upsample)\.conv\.", r".\1rs.0.conv."),
        (r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        *_ATTENTION,
        (r"\.norm_out\.", ".conv_norm_out."),
        *_RESNET,
    )
    return _apply(rules, name)


def old_diffusers_name(name: str) -> str:
    """The name of a tensor of attention without a context before diffusers 0.14."""
    return _apply(_OLD_ATTENTION, name)


def to_torch(array: np.ndarray, dimensions: int) -> np.ndarray:
    """Our array as torch's of that many dimensions: transposed, and with 1s for a 1×1 kernel.

    Vectors, embeddings and whatever is not a kernel must not be passed here.
    """
    flipped = array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
    return flipped.reshape(
        flipped.shape[:2] + flipped.shape[2:dimensions] + (1,) * (dimensions - array.ndim)
    )


def to_flax(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """torch's kernel as ours of that shape. Raises ValueError if it cannot be that."""
    flipped = array.transpose(*range(2, array.ndim), 1, 0)
    if [n for n in flipped.shape if n > 1] != [n for n in shape if n > 1]:
        raise ValueError(f"shape {array.shape} there cannot be {shape} here")
    return flipped.reshape(shape)
