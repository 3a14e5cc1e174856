"""DINOv2 and CLIP's image towers from files, in their authors' names and in transformers'.

A file says most of its network by its shapes. Heads, the activation and epsilons are those of
transformers' config.json beside it, and otherwise those of the published models.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.interop.files import Tensors
from ldm_jax.models.vision_transformer import VisionTransformer
from ldm_jax.pictures import cubic_matrix

DINO_SIDE = 224
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HEADS = {1280: 16, 1408: 16, 1664: 16}  # OpenCLIP's H, g and bigG; of all others width / 64


@dataclasses.dataclass(frozen=True)
class Names:
    """Where a code keeps the leaves of `VisionTransformer`; `{}` is the number of a block.

    `fused`: the tensor (3·width, …) of queries, keys and values, less its "weight" or "bias".
    """

    top: dict[str, str]
    block: dict[str, str]
    fused: str = ""


DINO = Names(
    {
        "patches": "patch_embed.proj",
        "positions": "pos_embed",
        "class_token": "cls_token",
        "registers": "register_tokens",
        "norm": "norm",
    },
    {
        "norm1": "blocks.{}.norm1",
        "out": "blocks.{}.attn.proj",
        "scale1": "blocks.{}.ls1.gamma",
        "norm2": "blocks.{}.norm2",
        "fc1": "blocks.{}.mlp.fc1",
        "fc2": "blocks.{}.mlp.fc2",
        "scale2": "blocks.{}.ls2.gamma",
    },
    "blocks.{}.attn.qkv.",
)
HF_DINO = Names(
    {
        "patches": "embeddings.patch_embeddings.projection",
        "positions": "embeddings.position_embeddings",
        "class_token": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "norm": "layernorm",
    },
    {
        "norm1": "encoder.layer.{}.norm1",
        "query": "encoder.layer.{}.attention.attention.query",
        "key": "encoder.layer.{}.attention.attention.key",
        "value": "encoder.layer.{}.attention.attention.value",
        "out": "encoder.layer.{}.attention.output.dense",
        "scale1": "encoder.layer.{}.layer_scale1.lambda1",
        "norm2": "encoder.layer.{}.norm2",
        "fc1": "encoder.layer.{}.mlp.fc1",
        "fc2": "encoder.layer.{}.mlp.fc2",
        "scale2": "encoder.layer.{}.layer_scale2.lambda1",
    },
)
HF_CLIP = Names(
    {
        "patches": "vision_model.embeddings.patch_embedding",
        "positions": "vision_model.embeddings.position_embedding.weight",
        "class_token": "vision_model.embeddings.class_embedding",
        "norm_pre": "vision_model.pre_layrnorm",
        "norm": "vision_model.post_layernorm",
        "projection": "visual_projection",
    },
    {
        "norm1": "vision_model.encoder.layers.{}.layer_norm1",
        "query": "vision_model.encoder.layers.{}.self_attn.q_proj",
        "key": "vision_model.encoder.layers.{}.self_attn.k_proj",
        "value": "vision_model.encoder.layers.{}.self_attn.v_proj",
        "out": "vision_model.encoder.layers.{}.self_attn.out_proj",
        "norm2": "vision_model.encoder.layers.{}.layer_norm2",
        "fc1": "vision_model.encoder.layers.{}.mlp.fc1",
        "fc2": "vision_model.encoder.layers.{}.mlp.fc2",
    },
)
CLIP = Names(
    {
        "patches": "visual.conv1",
        "positions": "visual.positional_embedding",
        "class_token": "visual.class_embedding",
        "norm_pre": "visual.ln_pre",
        "norm": "visual.ln_post",
        "projection": "visual.proj",
    },
    {
        "norm1": "visual.transformer.resblocks.{}.ln_1",
        "out": "visual.transformer.resblocks.{}.attn.out_proj",
        "norm2": "visual.transformer.resblocks.{}.ln_2",
        "fc1": "visual.transformer.resblocks.{}.mlp.c_fc",
        "fc2": "visual.transformer.resblocks.{}.mlp.c_proj",
    },
    "visual.transformer.resblocks.{}.attn.in_proj_",
)


def read_dino(weights: Tensors, path: Path) -> tuple[str, VisionTransformer, dict[str, Any]]:
    """The name, the network and its parameters of a DINOv2 file (Oquab et al. 2023), for pictures
    of 224 pixels, whose positions are made of the file's as the authors do: bicubic, with 0.1
    patches more, or antialiased if there are registers; transformers adds nothing.

    Raises:
      ValueError: ViT-g, whose MLPs are gated; or a tensor is missing.
    """
    ours = "patch_embed.proj.weight" in weights
    if any("mlp.w12." in name or "mlp.weights_in." in name for name in weights):
        raise ValueError(f"{path} is DINOv2 ViT-g, whose gated MLPs are not here: use S, B or L")
    names, config = (DINO if ours else HF_DINO), config_beside(path)
    leaves = _Leaves(weights, names)
    registers = names.top["registers"] in weights
    grid = DINO_SIDE // leaves.patch
    offset = 0.1 if ours and not registers else 0.0

    def resized(positions: np.ndarray) -> np.ndarray:
        side = round(len(positions[1:]) ** 0.5)
        if side == grid:
            return positions
        step = side / (grid + offset) if offset else None
        matrix = cubic_matrix(side, grid, step, antialias=registers)
        square = positions[1:].reshape(side, side, -1)
        square = np.einsum("Hh,Ww,hwc->HWc", matrix, matrix, square)
        return np.concatenate([positions[:1], square.reshape(grid * grid, -1)])

    network = VisionTransformer(
        side=DINO_SIDE,
        **leaves.sizes(config),
        epsilon=config.get("layer_norm_eps", 1e-6),
        layer_scale=True,
        registers=weights.shape(names.top["registers"])[-2] if registers else 0,
    )
    name = f"dinov2-width{leaves.width}-patch{leaves.patch}" + "-registers" * registers
    return name, network, leaves.params(network, resized)


def read_clip(weights: Tensors, path: Path) -> tuple[str, VisionTransformer, dict[str, Any]]:
    """The name, the network and its parameters of the image tower in a CLIP file: OpenAI's,
    OpenCLIP's or transformers', the whole model or CLIPVisionModelWithProjection.

    The activation is that of config.json or open_clip_config.json beside it; else quick_gelu with
    transformers' names, as there, and gelu with OpenCLIP's, but for OpenAI's own files.

    Raises:
      ValueError: the tower has another pooling than the class token, or a tensor is missing.
    """
    ours = "visual.conv1.weight" in weights
    names, config = (CLIP if ours else HF_CLIP), config_beside(path)
    if odd := next((n for n in weights if n.startswith("visual.attn_pool")), None):
        raise ValueError(f"{path} pools by attention (it has {odd}): use a CLIP of a class token")
    leaves = _Leaves(weights, names)
    grid = round((weights.shape(names.top["positions"])[0] - 1) ** 0.5)
    quick = not ours or "input_resolution" in weights
    vision = config.get("vision_config") or config
    if not isinstance(vision, dict):
        vision = {}
    if "model_cfg" in config:  # OpenCLIP's
        vision = {"hidden_act": "quick_gelu" if config["model_cfg"].get("quick_gelu") else "gelu"}
    activation = vision.get("hidden_act", "quick_gelu" if quick else "gelu")
    projected = _first(weights, names.top["projection"]) is not None
    network = VisionTransformer(
        side=grid * leaves.patch,
        **leaves.sizes(vision),
        activation=activation,
        epsilon=vision.get("layer_norm_eps", 1e-5),
        patch_bias=False,
        pre_norm=True,
        projection=leaves.projection() if projected else None,
    )
    name = f"clip-vision-width{leaves.width}-patch{leaves.patch}-{activation}"
    return name, network, leaves.params(network)


class _Leaves:
    """The tensors of a file as the leaves of a `VisionTransformer`."""

    def __init__(self, weights: Tensors, names: Names):
        self._weights, self._names = weights, names
        self.width, _, self.patch, _ = weights.shape(f"{names.top['patches']}.weight")
        pattern = re.escape(names.block["norm1"]).replace(r"\{\}", r"(\d+)") + r"\.weight"
        found = [int(match[1]) for name in weights if (match := re.fullmatch(pattern, name))]
        self.depth = 1 + max(found, default=-1)

    def sizes(self, config: dict[str, Any]) -> dict[str, Any]:
        heads = config.get("num_attention_heads", _HEADS.get(self.width, self.width // 64))
        inner = self._weights.shape(self._names.block["fc1"].format(0) + ".weight")[0]
        sizes = dict(patch=self.patch, width=self.width, depth=self.depth, inner=inner)
        return sizes | dict(heads=max(1, heads))

    def projection(self) -> int:
        place = _first(self._weights, self._names.top["projection"])
        return self._weights.shape(place)[1 if place == self._names.top["projection"] else 0]

    def params(
        self, network: VisionTransformer, resized: Callable[[np.ndarray], np.ndarray] = lambda p: p
    ) -> dict[str, Any]:
        wanted = {"patches", "positions", "class_token", "norm"}
        wanted |= {"norm_pre"} if network.pre_norm else set()
        wanted |= {"registers"} if network.registers else set()
        wanted |= {"projection"} if network.projection else set()
        params = {k: self._leaf(self._names.top[k]) for k in self._names.top if k in wanted}
        for name in ("class_token", "registers", "positions"):
            if name in params:
                params[name] = params[name].reshape(-1, self.width)
        params["positions"] = resized(params["positions"]).astype(np.float32)
        if isinstance(params.get("projection"), np.ndarray):  # (width, D): a kernel as it is
            params["projection"] = {"kernel": params["projection"]}
        for i in range(self.depth):
            block = {k: self._leaf(name.format(i)) for k, name in self._names.block.items()}
            if self._names.fused:
                place = self._names.fused.format(i)
                kernels = np.split(self._float(f"{place}weight"), 3)
                biases = np.split(self._float(f"{place}bias"), 3)
                for name, kernel, bias in zip(
                    ("query", "key", "value"), kernels, biases, strict=True
                ):
                    block[name] = {"kernel": kernel.T, "bias": bias}
            params[f"layers_{i}"] = block
        return params

    def _leaf(self, name: str) -> Any:
        """The array of this name, or the layer whose "weight" and "bias" begin so."""
        if name in self._weights:
            return self._float(name)
        weight = self._float(f"{name}.weight")
        leaves = {"scale": weight} if weight.ndim == 1 else {"kernel": weight.T}
        if weight.ndim == 4:
            leaves = {"kernel": weight.transpose(2, 3, 1, 0)}
        if f"{name}.bias" in self._weights:
            leaves["bias"] = self._float(f"{name}.bias")
        return leaves

    def _float(self, name: str) -> np.ndarray:
        if name not in self._weights:
            raise ValueError(f"the file lacks {name}, which such a network has")
        return self._weights[name].astype(np.float32)


def _first(weights: Tensors, name: str) -> str | None:
    return next((n for n in (name, f"{name}.weight") if n in weights), None)


def config_beside(path: Path) -> dict[str, Any]:
    """config.json or open_clip_config.json in the file's folder; {} without one."""
    for name in ("config.json", "open_clip_config.json"):
        if (path.parent / name).is_file():
            try:
                config = json.loads((path.parent / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path.parent / name} is no JSON: {error}") from error
            return config if isinstance(config, dict) else {}
    return {}
