"""The JSON of diffusers' components and our fields: tables that are read in both directions.

This module has the mechanism and the tables of autoencoders and text encoders; those of UNets are
in `unets`, noise and grids in `schedulers`. An absent key has its class's default, as in diffusers;
a value that our networks cannot express is an error.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.models.build import make_autoencoder
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.layers import level_widths, width_multiples
from ldm_jax.models.text import TextTransformer

log = logging.getLogger(__name__)
VERSION = "0.42.1"  # of diffusers, whose keys and defaults these are
Fields = dict[str, Any]
Ours = Mapping[str, Any]  # the fields of one of our networks


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def load(path: Path) -> Fields:
    """The object in a JSON file. Raises FileNotFoundError, ValueError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, where an object was expected")
    return content


def dump(path: Path, content: Fields) -> None:
    """Writes a JSON file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Json:
    """A JSON object whose keys are taken one by one, so that none is overlooked."""

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
        read_fields(self, checked(**allowed))

    def done(self) -> None:
        """Warns of remaining keys that are on.

        Like diffusers, this ignores unknown keys. Raises ValueError if they were written by a
        diffusers newer than `VERSION`, which may use them.
        """
        for key, value in self.left.items():
            if value in (None, False):
                continue
            if self.version > _version(VERSION):
                raise ValueError(f"{self.path}: {key}={value!r} is not a key that we know")
            log.warning("%s: %s=%r is no key of diffusers: passed over", self.path, key, value)


class Codec(NamedTuple):
    """Conversion between their value and ours, with our fields (when reading, of the rows above).

    `read` raises an error for a value that is not as `expected`. `write` returns `...` for a value
    that is not written.
    """

    read: Callable[[Any, Ours], Any] = lambda value, fields: value
    write: Callable[[Any, Ours], Any] = lambda value, fields: value
    expected: str = ""


def choice(names: dict[Any, Any]) -> Codec:
    """Their names of our values."""
    ours = {value: name for name, value in names.items()}
    expected = " or ".join(map(repr, names))
    return Codec(lambda value, _: names[value], lambda value, _: ours.get(value, ...), expected)


def derived(value: Callable[[Ours], Any], expected: str) -> Codec:
    """A value that follows from other fields."""

    def read(given: Any, fields: Ours) -> None:
        if given not in (None, value(fields)):
            raise ValueError

    return Codec(read, lambda _, fields: value(fields), expected)


def equal(value: Any, fields: Ours) -> Any:
    """One value, which may be repeated there for each level."""
    if isinstance(value, list):
        (value,) = set(value)
    return value


ONE = Codec(equal, expected="the same at all levels")
WIDTHS = Codec(
    lambda widths, _: (widths[0], width_multiples(widths)),
    lambda ours, _: level_widths(*ours),
    "a list of numbers",
)


@dataclass(frozen=True)
class Row:
    """A key of theirs.

    Attributes:
      ours: our field, or several; "": none.
      key: theirs.
      default: of their class.
      codec: between their value and ours.
      unless: value of ours, our network's default, at which a field is left out.
    """

    ours: str | tuple[str, ...]
    key: str
    default: Any = None
    codec: Codec = Codec()
    unless: Any = ...

    def read(self, content: Json, fields: Fields) -> None:
        value = content.take(self.key, self.default)
        try:
            found = self.codec.read(value, fields)
        except (ArithmeticError, LookupError, TypeError, ValueError):
            raise content.error(self.key, value, self.codec.expected) from None
        if isinstance(self.ours, tuple):
            fields |= {n: v for n, v in zip(self.ours, found, strict=True) if v != self.unless}
        elif self.ours and found != self.unless:
            fields[self.ours] = found

    def write(self, fields: Ours, content: Fields) -> None:
        several = isinstance(self.ours, tuple)
        ours = tuple(fields[name] for name in self.ours) if several else fields.get(self.ours, ...)
        value = self.codec.write(ours, fields)
        if value is not ...:
            content[self.key] = value


class Rows(NamedTuple):
    """Several keys that are read and written together."""

    read: Callable[[Json, Fields], None]
    write: Callable[[Ours, Fields], None]


Table = tuple[Row | Rows, ...]


def checked(**allowed: Any) -> Table:
    """Keys without a field: the value, or values of which the first is the default."""
    several = {key: v if isinstance(v, tuple) else (v,) for key, v in allowed.items()}
    return tuple(Row("", key, v[0], choice(dict.fromkeys(v))) for key, v in several.items())


def passed_over(*keys: str) -> Table:
    """Keys that are ignored."""
    return tuple(Row("", key) for key in keys)


def read_fields(content: Json, table: Table) -> Fields:
    """Our fields. Raises ValueError for a value that is not expected, with file and key."""
    fields: Fields = {}
    for row in table:
        row.read(content, fields)
    return fields


def write_fields(table: Table, fields: Ours, **about: Any) -> Fields:
    """The JSON of a component from all fields of our network; `about` comes first."""
    for row in table:
        row.write(fields, about)
    return about


DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}


def _attending(names: list[str], fields: Ours) -> list[int]:
    """Sides, of pictures of a nominal 256, at which an autoencoder's levels attend."""
    attends = [DOWN[name] for name, _ in zip(names, fields["ch_mult"], strict=True)]
    return [256 // 2**level for level, there in enumerate(attends) if there]


def _down(_: Any, fields: Ours) -> list[str]:
    sides = [fields.get("resolution", 256) // 2**i for i in range(len(fields["ch_mult"]))]
    return ["Attn" * (side in fields["attn_resolutions"]) + "DownEncoderBlock2D" for side in sides]


def _up(fields: Ours) -> list[str]:
    return [name.replace("DownEncoder", "UpDecoder") for name in reversed(_down(None, fields))]


_LEVELS: Table = (
    *passed_over("force_upcast"),
    *checked(act_fn=("silu", "swish")),
    Row("sample_size", "sample_size", None, Codec(lambda *_: None), unless=None),
    Row("in_channels", "in_channels", 3),
    Row("out_ch", "out_channels", 3),
    Row(("ch", "ch_mult"), "block_out_channels", [64], WIDTHS),
    Row(
        "attn_resolutions",
        "down_block_types",
        ["DownEncoderBlock2D"],
        Codec(_attending, _down, f"{' or '.join(DOWN)} for each width"),
    ),
    Row("", "up_block_types", None, derived(_up, "the counterparts of down_block_types")),
    Row("num_res_blocks", "layers_per_block", 1),
    Row("mid_attn", "mid_block_add_attention", True, unless=True),
    Row("groups", "norm_num_groups", 32, unless=32),
)
_BOTH = derived(lambda fields: fields.get("use_quant_conv", True), "the same as use_quant_conv")
_KL: Table = (
    *_LEVELS,
    *checked(shift_factor=(None, 0), latents_mean=None, latents_std=None),
    Row("z_channels", "latent_channels", 4),
    Row("use_quant_conv", "use_quant_conv", True, unless=True),
    Row("", "use_post_quant_conv", True, _BOTH),
    Row("scale_factor", "scaling_factor", 0.18215),
)
_VQ: Table = (
    *_LEVELS,
    *checked(norm_type="group", lookup_from_codebook=False),
    Row("z_channels", "latent_channels", 3),
    Row("embed_dim", "vq_embed_dim", None, Codec(lambda n, fields: n or fields["z_channels"])),
    Row("n_embed", "num_vq_embeddings", 256),
    # Files without the key are LDM's own, whose latents were not scaled. diffusers now uses 0.18215
    # for them as well, and draws wrong pictures (its issue 6725).
    Row("scale_factor", "scaling_factor", 1.0),
)
_ENCODER = ONE._replace(write=lambda width, fields: [width] * len(fields["encoder_blocks"]))
_DECODER = derived(lambda f: [f["width"]] * len(f["decoder_blocks"]), "those of the encoder")
_TINY: Table = (
    # The widths a second time, and the range of latents that are stored as pictures.
    *passed_over("sample_size", "force_upcast", "block_out_channels"),
    *passed_over("latent_magnitude", "latent_shift"),
    *checked(act_fn="relu", upsample_fn="nearest", upsampling_scaling_factor=2),
    *checked(scaling_factor=1.0, shift_factor=0.0),
    Row("in_channels", "in_channels", 3),
    Row("out_channels", "out_channels", 3),
    Row("latent_channels", "latent_channels", 4),
    Row("encoder_blocks", "num_encoder_blocks", [1, 3, 3, 3]),
    Row("decoder_blocks", "num_decoder_blocks", [3, 3, 3, 1]),
    Row("width", "encoder_block_out_channels", [64] * 4, _ENCODER),
    Row("", "decoder_block_out_channels", [64] * 4, _DECODER),
)
# Class of theirs → our kind, table.
AUTOENCODERS = {
    "AutoencoderKL": ("kl", _KL),
    "VQModel": ("vq", _VQ),
    "AutoencoderTiny": ("tiny", _TINY),
}


def autoencoder_from(content: Json) -> Fields:
    """The section `autoencoder` of a component of a class in `AUTOENCODERS`."""
    kind, table = AUTOENCODERS[content.class_name]
    fields = read_fields(content, table)
    content.done()
    latents = dict(embed_dim=fields["z_channels"]) if kind == "kl" else {}
    return dict(kind=kind) | fields | latents


def autoencoder_to(section: Fields, sample_size: int) -> Fields:
    """The JSON of an autoencoder. Raises ValueError for what diffusers cannot express."""
    fields, kind = vars(make_autoencoder(section)), section.get("kind", "kl")
    classes = {known: name for name, (known, _) in AUTOENCODERS.items()}
    if kind not in classes:
        raise ValueError(f"autoencoder.kind={kind!r}: a pipeline of diffusers has an autoencoder")
    limits = dict(patch_size=1, local=False, encoder_ch=0)
    limits |= dict(embed_dim=fields["z_channels"]) if kind == "kl" else {}
    for name, only in limits.items():
        if fields.get(name, only) != only:
            raise ValueError(f"autoencoder.{name}={fields[name]}, where diffusers has only {only}")
    about = dict(_class_name=classes[kind], _diffusers_version=VERSION)
    table = AUTOENCODERS[classes[kind]][1]
    return write_fields(table, fields | dict(sample_size=sample_size), **about)


_MLP = Codec(
    lambda inner, fields: None if inner == 4 * fields["width"] else inner,
    lambda inner, fields: inner or 4 * fields["width"],
)
# The text ends at the highest id, for which transformers writes 2, or at the first `end`.
_END = Codec(
    lambda end, fields: None if end in (2, fields["vocab_size"] - 1) else end,
    lambda end, _: 2 if end is None else end,
)
_ACTIVATIONS = choice(dict(quick_gelu="quick_gelu", gelu="gelu"))
_CLIP: Table = (
    Row("vocab_size", "vocab_size", 49408),
    Row("width", "hidden_size", 512),
    Row("mlp_width", "intermediate_size", 2048, _MLP, unless=None),
    Row("depth", "num_hidden_layers", 12),
    Row("heads", "num_attention_heads", 8),
    Row("max_length", "max_position_embeddings", 77),
    Row("activation", "hidden_act", "quick_gelu", _ACTIVATIONS),
    Row("epsilon", "layer_norm_eps", 1e-5, unless=1e-5),
    Row("eos", "eos_token_id", 49407, _END),
)
_BERT: Table = (
    *checked(activation_function="gelu", scale_embedding=False),
    Row("vocab_size", "vocab_size", 30522),
    Row("width", "d_model", 1280),
    Row("", "encoder_ffn_dim", None, derived(lambda f: 4 * f["width"], "4 times d_model")),
    Row("depth", "encoder_layers", 32),
    Row("heads", "encoder_attention_heads", 8),
    Row("head_dim", "head_dim", 64),
    Row("max_length", "max_position_embeddings", 77),
)
# Class of theirs → `model_type` of transformers, table.
ENCODERS = {
    "CLIPTextModel": ("clip_text_model", _CLIP),
    "CLIPTextModelWithProjection": (
        "clip_text_model",
        (*_CLIP, Row("projection", "projection_dim", 512)),
    ),
    "LDMBertModel": ("ldmbert", _BERT),
}


def encoder_to(network: str, fields: Fields) -> Fields:
    """The JSON of a text encoder, network "clip" or "bert"."""
    name, module = "LDMBertModel", (CLIPText if network == "clip" else TextTransformer)(**fields)
    if network == "clip":
        name = "CLIPTextModel" + "WithProjection" * (module.projection is not None)
    model_type, table = ENCODERS[name]
    return write_fields(table, vars(module), architectures=[name], model_type=model_type)
