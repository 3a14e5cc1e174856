"""The JSON of diffusers' autoencoders and of the text encoders, as ours, and back.

UNets are in `unets`, noise and grids in `schedulers`. A key that is absent counts as its class's
default, as diffusers has it; a value that our networks cannot express is an error.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

from ldm_jax.models.build import make_autoencoder

log = logging.getLogger(__name__)
VERSION = "0.42.1"  # of diffusers, whose keys and defaults these are
# Options that nothing here has.
OFF = {
    *("center_input_sample", "dual_cross_attention", "encoder_hid_dim", "encoder_hid_dim_type"),
    *("class_embeddings_concat", "cross_attention_norm", "num_attention_heads"),
    *("resnet_skip_time_act", "reverse_transformer_layers_per_block", "time_cond_proj_dim"),
    *("time_embedding_act_fn", "timestep_post_act"),
}


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def load(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError, ValueError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, where an object was expected")
    return content


class Json:
    """A JSON object whose keys are taken one by one, so that none goes unseen."""

    def __init__(self, path: Path):
        content = load(path)
        self.path = path
        self.class_name = content.get("_class_name")
        self.version = _version(content.get("_diffusers_version", VERSION))
        self.left = {key: value for key, value in content.items() if not key.startswith("_")}

    def take(self, key: str, default: Any = None) -> Any:
        return self.left.pop(key, default)

    def error(self, key: str, value: Any, expected: str) -> ValueError:
        """The error to raise for a value."""
        return ValueError(f"{self.path}: {key}={value!r} is not supported: expected {expected}")

    def expect(self, **allowed: Any) -> None:
        """Takes keys that must be absent or have a value, or one of a tuple of values."""
        for key, values in allowed.items():
            values = values if isinstance(values, tuple) else (values,)
            value = self.take(key, values[0])
            if value not in values:
                raise self.error(key, value, " or ".join(repr(v) for v in values))

    def one(self, key: str, default: Any, count: int) -> Any:
        """A value that may be given once for each of `count` levels, but must be the same."""
        value = self.take(key, default)
        if isinstance(value, list):
            if len(value) != count or len(set(value)) != 1:
                raise self.error(key, value, f"one number, or {count} that are equal")
            return value[0]
        return value

    def done(self) -> None:
        """Raises ValueError if a key is left that is on and counts; warns of one that does not.

        Keys that `VERSION` of diffusers does not know it passes over, and so do we, unless a newer
        one has written them.
        """
        for key, value in self.left.items():
            if value in (None, False):
                continue
            if key in OFF:
                raise self.error(key, value, "null or false")
            if self.version > _version(VERSION):
                raise ValueError(f"{self.path}: {key}={value!r} is not a key that we know")
            log.warning("%s: %s=%r is no key of diffusers: passed over", self.path, key, value)


def multiples(json: Json, widths: list[int]) -> list[int]:
    """`block_out_channels` as multiples of the first."""
    if any(width % widths[0] for width in widths):
        raise json.error("block_out_channels", widths, "multiples of the first")
    return [width // widths[0] for width in widths]


def _stage_levels(json: Json) -> tuple[list[int], list[int]]:
    """(widths, levels that attend) of AutoencoderKL or VQModel."""
    widths = json.take("block_out_channels", [64])
    down = json.take("down_block_types", ["DownEncoderBlock2D"])
    up = json.take("up_block_types", ["UpDecoderBlock2D"])
    known = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
    wrong = next((name for name in down if name not in known), None)
    if wrong or len(down) != len(widths):
        raise json.error("down_block_types", wrong or down, f"{' or '.join(known)} for each width")
    attends = [name.startswith("Attn") for name in down]
    mirrored = ["AttnUpDecoderBlock2D" if there else "UpDecoderBlock2D" for there in attends[::-1]]
    if up != mirrored:
        raise json.error("up_block_types", up, f"{mirrored}, the counterparts of down_block_types")
    return widths, [i for i, there in enumerate(attends) if there]


def autoencoder_from(json: Json) -> dict[str, Any]:
    """The section `autoencoder` of an AutoencoderKL, VQModel or AutoencoderTiny."""
    json.take("sample_size")  # of a training picture; any size goes through
    json.take("force_upcast")  # to float32, for the sake of float16
    if json.class_name == "AutoencoderTiny":
        return _tiny_from(json)
    vq = json.class_name == "VQModel"
    widths, attends = _stage_levels(json)
    latents = json.take("latent_channels", 3 if vq else 4)
    fields = dict(
        kind="vq" if vq else "kl",
        ch=widths[0],
        ch_mult=multiples(json, widths),
        num_res_blocks=json.take("layers_per_block", 1),
        # Of pictures of a nominal 256.
        attn_resolutions=[256 // 2**i for i in attends],
        in_channels=json.take("in_channels", 3),
        out_ch=json.take("out_channels", 3),
        z_channels=latents,
        embed_dim=latents,
    )
    if vq:
        fields["embed_dim"] = json.take("vq_embed_dim") or latents
        fields["n_embed"] = json.take("num_vq_embeddings", 256)
        json.expect(norm_type="group", lookup_from_codebook=False)
        # Older than the key are LDM's own, whose latents were not scaled. diffusers has since taken
        # 0.18215 for them, too, and draws garbage (its issue 6725).
        fields["scale_factor"] = json.take("scaling_factor", 1.0)
    else:
        quantised = json.take("use_quant_conv", True)
        if (after := json.take("use_post_quant_conv", True)) != quantised:
            raise json.error("use_post_quant_conv", after, f"{quantised}, as use_quant_conv")
        json.expect(shift_factor=(None, 0), latents_mean=None, latents_std=None)
        fields |= {} if quantised else dict(use_quant_conv=False)
        fields["scale_factor"] = json.take("scaling_factor", 0.18215)
    fields |= {} if json.take("mid_block_add_attention", True) else dict(mid_attn=False)
    groups = json.take("norm_num_groups", 32)
    fields |= dict(groups=groups) if groups != 32 else {}
    json.expect(act_fn=("silu", "swish"))
    json.done()
    return fields


def _tiny_from(json: Json) -> dict[str, Any]:
    encoder = json.take("num_encoder_blocks", [1, 3, 3, 3])
    decoder = json.take("num_decoder_blocks", [3, 3, 3, 1])
    width = json.one("encoder_block_out_channels", [64] * 4, len(encoder))
    json.take("block_out_channels")  # a copy of the decoder's
    if (other := json.one("decoder_block_out_channels", [64] * 4, len(decoder))) != width:
        raise json.error("decoder_block_out_channels", other, f"{width}, as in the encoder")
    fields = dict(
        kind="tiny",
        in_channels=json.take("in_channels", 3),
        out_channels=json.take("out_channels", 3),
        latent_channels=json.take("latent_channels", 4),
        width=width,
        encoder_blocks=encoder,
        decoder_blocks=decoder,
    )
    json.take("latent_magnitude")  # of latents stored as pictures
    json.take("latent_shift")
    json.expect(act_fn="relu", upsample_fn="nearest", upsampling_scaling_factor=2)
    json.expect(scaling_factor=1.0, shift_factor=0.0)
    json.done()
    return fields


def autoencoder_to(section: dict[str, Any], sample_size: int) -> dict[str, Any]:
    """The JSON of an autoencoder. Raises ValueError for what diffusers cannot express."""
    kind, module = section.get("kind", "kl"), make_autoencoder(section)
    if kind == "identity":
        raise ValueError("autoencoder.kind='identity': a pipeline of diffusers has an autoencoder")
    common = dict(_diffusers_version=VERSION, in_channels=module.in_channels)
    if kind == "tiny":
        return common | dict(
            _class_name="AutoencoderTiny",
            out_channels=module.out_channels,
            latent_channels=module.latent_channels,
            encoder_block_out_channels=[module.width] * len(module.encoder_blocks),
            decoder_block_out_channels=[module.width] * len(module.decoder_blocks),
            num_encoder_blocks=list(module.encoder_blocks),
            num_decoder_blocks=list(module.decoder_blocks),
        )
    if module.patch_size != 1:
        raise ValueError(f"autoencoder.patch_size={module.patch_size}, where diffusers has only 1")
    levels = range(len(module.ch_mult))
    attends = [module.resolution // 2**i in module.attn_resolutions for i in levels]
    common |= dict(
        _class_name="VQModel" if kind == "vq" else "AutoencoderKL",
        sample_size=sample_size,
        out_channels=module.out_ch,
        block_out_channels=[mult * module.ch for mult in module.ch_mult],
        down_block_types=["Attn" * there + "DownEncoderBlock2D" for there in attends],
        up_block_types=["Attn" * there + "UpDecoderBlock2D" for there in attends[::-1]],
        layers_per_block=module.num_res_blocks,
        latent_channels=module.z_channels,
        norm_num_groups=module.groups,
        mid_block_add_attention=module.mid_attn,
        scaling_factor=module.scale_factor,
        act_fn="silu",
    )
    if kind == "vq":
        return common | dict(vq_embed_dim=module.embed_dim, num_vq_embeddings=module.n_embed)
    if module.embed_dim != module.z_channels:
        raise ValueError(
            f"autoencoder.embed_dim={module.embed_dim}, where AutoencoderKL has as many as "
            f"z_channels={module.z_channels}"
        )
    quantised = dict(use_quant_conv=module.use_quant_conv)
    return common | quantised | dict(use_post_quant_conv=module.use_quant_conv, force_upcast=True)


def clip_from(json: Json, projection: bool) -> dict[str, Any]:
    """The fields of CLIPText from CLIPTextModel, or, with `projection`, …WithProjection.

    transformers writes many keys that say nothing of the network; those are passed over.
    """
    width = json.take("hidden_size", 512)
    vocabulary = json.take("vocab_size", 49408)
    inner = json.take("intermediate_size", 2048)
    if inner != 4 * width:
        raise json.error("intermediate_size", inner, f"{4 * width}, 4 times hidden_size")
    json.expect(layer_norm_eps=1e-5)
    activation = json.take("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise json.error("hidden_act", activation, "'quick_gelu' or 'gelu'")
    # The text ends at the highest id, which 2 stands for in transformers, or at the first of one.
    eos = json.take("eos_token_id", 49407)
    return dict(
        vocab_size=vocabulary,
        width=width,
        depth=json.take("num_hidden_layers", 12),
        heads=json.take("num_attention_heads", 8),
        max_length=json.take("max_position_embeddings", 77),
        activation=activation,
        projection=json.take("projection_dim", 512) if projection else None,
        layer="last",
        final_norm=True,
        eos=None if eos in (2, vocabulary - 1) else eos,
    )


def clip_to(network: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a CLIP text encoder."""
    projection = network.get("projection")
    name = "CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"
    eos = network.get("eos")
    return dict(
        architectures=[name],
        model_type="clip_text_model",
        vocab_size=network.get("vocab_size", 49408),
        hidden_size=network.get("width", 768),
        intermediate_size=4 * network.get("width", 768),
        num_hidden_layers=network.get("depth", 12),
        num_attention_heads=network.get("heads", 12),
        max_position_embeddings=network.get("max_length", 77),
        hidden_act=network.get("activation", "quick_gelu"),
        projection_dim=network.get("width", 768) if projection is None else projection,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=2 if eos is None else eos,
        pad_token_id=1,
    )


def bert_from(json: Json) -> dict[str, Any]:
    """The fields of TextTransformer from diffusers' LDMBertModel."""
    width = json.take("d_model", 1280)
    json.expect(encoder_ffn_dim=4 * width, activation_function="gelu", scale_embedding=False)
    return dict(
        vocab_size=json.take("vocab_size", 30522),
        width=width,
        depth=json.take("encoder_layers", 32),
        heads=json.take("encoder_attention_heads", 8),
        head_dim=json.take("head_dim", 64),
        max_length=json.take("max_position_embeddings", 77),
    )


def bert_to(network: dict[str, Any]) -> dict[str, Any]:
    """The JSON of an LDMBertModel."""
    width = network["width"]
    return dict(
        architectures=["LDMBertModel"],
        model_type="ldmbert",
        vocab_size=network["vocab_size"],
        d_model=width,
        encoder_layers=network["depth"],
        encoder_ffn_dim=4 * width,
        encoder_attention_heads=network.get("heads", 8),
        head_dim=network.get("head_dim", 64),
        max_position_embeddings=network.get("max_length", 77),
        activation_function="gelu",
        scale_embedding=False,
        pad_token_id=0,
    )
