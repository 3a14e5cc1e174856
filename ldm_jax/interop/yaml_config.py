"""The training YAML of a model of CompVis' or SGM's code.

It has what no tensor determines: heads, the noise, the meaning of the output, the scale of the
latents, the size of pictures. Where the tensors determine a value as well, both must agree. It is
read for `latent-diffusion`, `stable-diffusion`, `stablediffusion` and `generative-models`; classes
are recognised by the last part of their `target`, because forks move them.
"""

import copy
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ldm_jax.diffusion.schedule import BETAS, make_schedule
from ldm_jax.interop.fields import State, canonical
from ldm_jax.interop.recognise import Part, Recognised
from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.models.unet import UNet

Section = dict[str, Any]

LATENT = (
    *("LatentDiffusion", "LatentInpaintDiffusion", "LatentDepth2ImageDiffusion"),
    *("LatentUpscaleDiffusion", "LatentUpscaleFinetuneDiffusion", "LatentFinetuneDiffusion"),
    *("ImageEmbeddingConditionedLatentDiffusion", "MinimalRETRODiffusion"),
)
STAGES = {
    "AutoencoderKL": "kl",
    "AutoencoderKLInferenceWrapper": "kl",
    "VQModel": "vq",
    "VQModelInterface": "vq",
    "IdentityFirstStage": "identity",
}
# Conditioners by the names of `recognise.CONDITIONERS`; None has no network.
CONDITIONERS = {
    "FrozenCLIPEmbedder": "clip",
    "FrozenOpenCLIPEmbedder": "openclip",
    "FrozenOpenCLIPEmbedder2": "openclip",
    "BERTEmbedder": "bert",
    "TransformerEmbedder": "bert",
    "ClassEmbedder": "class",
    "SpatialRescaler": "rescaler",
    "ConcatTimestepEmbedderND": None,
    "Identity": None,  # an array of the caller
}
SCALINGS = {"EpsScaling": "eps", "VScaling": "v"}
# Parameters of a UNet that are fields of ours; of the others, those that do not change its output,
# and those that must have a certain value.
UNET_FIELDS = UNet.__dataclass_fields__.keys() - {"dropout", "groups", "dtype", "param_dtype"}
UNET_PASSED_OVER = (
    *("image_size", "dropout", "use_checkpoint", "use_fp16", "use_bf16", "legacy"),
    *("spatial_transformer_attn_type", "transformer_depth_middle", "use_new_attention_order"),
)
UNET_FIXED = {
    **dict(dims=2, conv_resample=True, num_heads_upsample=-1, disable_middle_self_attn=False),
    **dict.fromkeys(("n_embed", "num_attention_blocks", "adm_hidden")),
}
STAGE_FIELDS = AutoencoderKL.__dataclass_fields__.keys() - {"mid_attn", "dropout", "dtype"}


@dataclass(frozen=True)
class Original:
    """The content of a YAML; None where it has no value.

    Attributes:
      unet, autoencoder: fields, of the latter with its kind.
      conditioners: (kind, parameters) of those with a network, in order.
      scale: of the latents; "file" if it is in the file.
      side: of the latents in training.
    """

    path: Path
    autoencoder: Section
    unet: Section | None = None
    conditioning_key: str | None = None
    conditioners: tuple[tuple[str, Section], ...] = ()
    schedule: Section | None = None
    parameterization: str | None = None
    scale: float | str | None = None
    side: int | None = None
    guidance: float | None = None
    new_attention_order: bool = False

    def applied(self, found: Recognised, state: State, lent: set[str]) -> Recognised:
        """The recognised model with the YAML's values; parts with prefixes `lent` are not its own.

        Raises ValueError where tensors and YAML disagree.
        """
        config, parts = copy.deepcopy(found.config), dict(found.parts)
        if (self.unet is None) != ("unet" not in config):
            raise ValueError(f"is a {found.name}, but {self.path} is of another kind of model")
        if self.unet is not None:
            fields = config["unet"] = self._unet(config["unet"])
            order = dict(new_attention_order=self.new_attention_order)
            parts["unet"] = replace(parts["unet"], fields=fields, **order)
        if "autoencoder" in parts and parts["autoencoder"].prefix not in lent:
            said, held = (
                canonical(dict(autoencoder=section))["autoencoder"]
                for section in (self.autoencoder, config["autoencoder"])
            )
            self._compare(
                "autoencoder", said, held, {"scale_factor", "n_embed"} - {*self.autoencoder}
            )
        if config["task"] != "diffusion":
            return Recognised(f"{found.name} as {self.path.name} says", config, parts)
        conditioners = {
            name: part for name, part in parts.items() if name in config["conditioning"]
        }
        if not any(part.prefix in lent for part in conditioners.values()):
            for name, network in self._networks(conditioners, config["conditioning"]).items():
                config["conditioning"][name]["network"] |= network
                parts[name] = replace(parts[name], fields=parts[name].fields | network)
        config["autoencoder"]["scale_factor"] = self._scale(config, state)
        config["diffusion"]["schedule"] = self._schedule(config, state)
        config["diffusion"]["parameterization"] = self.parameterization
        if self.side:
            factor = 2 ** (len(self.autoencoder.get("ch_mult", [1])) - 1)
            config["image_size"] = self.side * factor
        if self.guidance:
            config["sampling"]["guidance"] = self.guidance
        return Recognised(f"model of {self.path.name}", config, parts)

    def _differ(self, what: str, said: Any, held: Any) -> ValueError:
        return ValueError(f"has {what} {held!r}, but {self.path} says {said!r}")

    def _compare(self, what: str, said: Section, held: Section, untold: Collection[str]) -> None:
        for name in sorted(said.keys() - untold, key=lambda name: (name != "kind", name)):
            if said[name] != held.get(name):
                raise self._differ(f"{what}.{name}", said[name], held.get(name))

    def _unet(self, fields: Section) -> Section:
        heads = {"num_heads", "num_head_channels"}
        untold = {*heads, "disable_self_attentions"}
        fields = {name: value for name, value in fields.items() if name not in heads}
        key, context = self.conditioning_key, fields.get("context_dim")
        if key and (key[:5] in ("cross", "hybri")) != (context is not None):
            raise self._differ("unet.context_dim", f"conditioning_key={key}", context)
        # If every attention is as wide as the context, shapes do not determine it.
        fields = dict(context_dim=self.unet.get("context_dim")) | fields
        fields |= {name: value for name, value in self.unet.items() if name in untold}
        self._compare(
            "unet", *(canonical(dict(unet=f))["unet"] for f in (self.unet, fields)), untold
        )
        return fields

    def _networks(self, parts: dict[str, Part], sections: Section) -> dict[str, Section]:
        """Fields of conditioners that no shape determines."""
        held = [p.layout if p.layout == "openclip" else p.network for p in parts.values()]
        said = [kind for kind, _ in self.conditioners]
        if said != held:
            raise self._differ("conditioners", said, held)
        networks: dict[str, Section] = {}
        for (name, part), (kind, params) in zip(parts.items(), self.conditioners, strict=True):
            layer, networks[name] = params.get("layer", "last"), {}
            if kind == "rescaler":
                networks[name] = dict(n_stages=params.get("n_stages", 1))
            elif kind == "clip" and layer == "hidden":
                networks[name] = dict(layer="penultimate", final_norm=False)
            elif kind == "openclip" and layer == "last" and "text_projection" in part.ignored:
                # The last block was left out, as in SD 2.
                networks[name] = dict(depth=sections[name]["network"]["depth"] + 1)
        return networks

    def _scale(self, config: Section, state: State) -> float:
        held = config["autoencoder"]["scale_factor"]
        if "scale_factor" not in state:
            if self.scale == "file":
                raise ValueError(f"has no scale_factor, where {self.path} says scale_by_std")
            return self.scale
        if self.scale != "file" and not np.isclose(held, self.scale, rtol=1e-5):
            raise self._differ("scale_factor", self.scale, held)
        return held

    def _schedule(self, config: Section, state: State) -> Section:
        held = config["diffusion"]["schedule"]
        said = self.schedule | dict(zero_terminal_snr=held["zero_terminal_snr"])
        tables = [make_schedule(**section).alphas_cumprod for section in (held, said)]
        known = any(key in state for key in ("alphas_cumprod", "betas", "denoiser.sigmas"))
        if known and (len(tables[0]) != len(tables[1]) or not np.allclose(*tables, atol=4e-3)):
            raise self._differ("the schedule", said, held)
        return said


class _Section(dict):
    """A section of a YAML with its file and place, which its errors name."""

    def __init__(self, path: Path, place: str, content: Any):
        self.path, self.place = path, place
        if not isinstance(content, dict):
            raise ValueError(f"{path}: {place}={content!r} is not supported: expected a section")
        super().__init__(content)

    def error(self, key: str, expected: str) -> ValueError:
        place = f"{self.path}: {self.place}.{key}={self.get(key)!r}"
        return ValueError(f"{place} is not supported: expected {expected}")

    def section(self, key: str) -> "_Section":
        return _Section(self.path, f"{self.place}.{key}".removeprefix("."), self.get(key))

    def part(self, key: str, known: Collection[str]) -> tuple[str, "_Section"]:
        """Class name and parameters of a section with `target` and `params`."""
        part = self.section(key)
        name = str(part.get("target")).rpartition(".")[2]
        if name not in known:
            raise part.error("target", f"one of {', '.join(known)}")
        return name, part.section("params") if part.get("params") else _Section(self.path, key, {})

    def choice(self, key: str, default: str, known: Collection[str]) -> str:
        if self.setdefault(key, default) not in known:
            raise self.error(key, f"one of {', '.join(known)}")
        return self[key]

    def number(self, key: str, default: float) -> float:
        try:  # YAML reads 1e-4 as text
            return float(self.get(key, default))
        except (TypeError, ValueError) as error:
            raise self.error(key, "a number") from error


def _unet(_: str, params: _Section) -> Section:
    """Fields of the UNet, and the order of its attention."""
    fields = {key: params[key] for key in UNET_FIELDS if params.get(key) is not None}
    for key in params.keys() - UNET_FIELDS - UNET_FIXED.keys() - {*UNET_PASSED_OVER}:
        raise params.error(key, "no such key")
    for key, value in UNET_FIXED.items():
        if params.get(key, value) != value:
            raise params.error(key, repr(value))
    if isinstance(blocks := fields.get("num_res_blocks"), list):
        if len(set(blocks)) != 1:
            raise params.error("num_res_blocks", "one number for all levels")
        fields["num_res_blocks"] = blocks[0]
    if fields.get("num_heads") == -1:
        del fields["num_heads"]
    if not {"num_heads", "num_head_channels"} & fields.keys():
        raise params.error("num_heads", "a number, or num_head_channels")
    order = bool(params.get("use_new_attention_order"))
    return dict(unet=fields, new_attention_order=order)


def _stage(name: str, params: _Section, channels: int = 3) -> Section:
    """Fields of the autoencoder."""
    if STAGES[name] == "identity":
        return dict(kind="identity", in_channels=channels)
    said = params.section("ddconfig")
    fields = {key: said[key] for key in STAGE_FIELDS if key in said}
    attention = said.get("attn_type", "vanilla") != "none"
    fields |= dict(kind=STAGES[name], mid_attn=attention)
    fields["attn_resolutions"] = fields.get("attn_resolutions", []) * attention
    return fields | {key: params[key] for key in ("embed_dim", "n_embed") if key in params}


def _with_networks(parts: list[tuple[str, _Section]]) -> tuple[tuple[str, Section], ...]:
    return tuple((CONDITIONERS[name], params) for name, params in parts if CONDITIONERS[name])


def _latent(params: _Section) -> Section:
    """Reads a YAML of latent-diffusion, stable-diffusion or stablediffusion."""
    said = _unet(*params.part("unet_config", ("UNetModel",)))
    conditioners: list = []
    if params.get("cond_stage_config") not in ("__is_first_stage__", "__is_unconditional__", None):
        conditioners.append(params.part("cond_stage_config", CONDITIONERS))
    side = params.get("image_size", 256)
    schedule = dict(
        name=params.choice("beta_schedule", "linear", BETAS),
        timesteps=int(params.number("timesteps", 1000)),
        start=params.number("linear_start", 1e-4),
        end=params.number("linear_end", 2e-2),
    )
    return said | dict(
        conditioning_key=params.get("conditioning_key"),
        conditioners=_with_networks(conditioners),
        schedule=schedule,
        parameterization=params.choice("parameterization", "eps", ("eps", "x0", "v")),
        scale="file" if params.get("scale_by_std") else params.number("scale_factor", 1.0),
        side=side[0] if isinstance(side, list) else side,
    )


def _engine(params: _Section) -> Section:
    """Reads a YAML of generative-models."""
    said = _unet(*params.part("network_config", ("UNetModel",)))
    _, denoiser = params.part("denoiser_config", ("DiscreteDenoiser",))
    scaling, _ = denoiser.part("scaling_config", SCALINGS)
    _, table = denoiser.part("discretization_config", ("LegacyDDPMDiscretization",))
    conditioners: list = []
    if params.get("conditioner_config"):
        known = ("GeneralConditioner", "UnconditionalConditioner")
        _, inner = params.part("conditioner_config", known)
        models = _Section(params.path, f"{inner.place}.emb_models", {})
        models |= dict(enumerate(inner.get("emb_models") or ()))
        conditioners = [models.part(i, CONDITIONERS) for i in models]
    schedule = dict(
        name="linear",
        timesteps=int(table.number("num_timesteps", 1000)),
        start=table.number("linear_start", 0.00085),
        end=table.number("linear_end", 0.012),
    )
    guider = params
    for key in ("sampler_config", "params", "guider_config", "params"):
        guider = guider.section(key) if guider.get(key) else _Section(params.path, key, {})
    return said | dict(
        conditioners=_with_networks(conditioners),
        schedule=schedule,
        parameterization=SCALINGS[scaling],
        scale=params.number("scale_factor", 1.0),
        guidance=guider.number("scale", 0.0) or None,
    )


def read_original(path: str | os.PathLike) -> Original:
    """Reads a YAML of CompVis' or SGM's code.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no YAML, unknown classes, or values that our networks do not have, by key.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no YAML at {path}: there is no such file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    tree = _Section(path, "", tree if isinstance(tree, dict) else {})
    try:
        return _original(path, tree)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} lacks a value, or has one of another type: {error!r}") from error


def _original(path: Path, tree: _Section) -> Original:
    name, params = tree.part("model", (*LATENT, "DiffusionEngine", *STAGES))
    if name in STAGES:
        return Original(path, _stage(name, params))
    said = _engine(params) if name == "DiffusionEngine" else _latent(params)
    stage = _stage(*params.part("first_stage_config", STAGES), said["unet"]["out_channels"])
    return Original(path, stage, **said)
