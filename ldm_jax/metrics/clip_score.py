"""How well pictures fit their captions, by a CLIP that holds both towers (Hessel et al. 2021).

The file is transformers' or OpenCLIP's, and is read without torch. Pictures pass through CLIP's own
preprocessing (`pictures.cropped`), captions through its tokenizer, without a prompt around them.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditions.tokenizer import BytePair
from ldm_jax.interop.fields import Shapes, text_fields
from ldm_jax.interop.files import Tensors, open_shards, open_state
from ldm_jax.interop.layout import read_params, slots
from ldm_jax.interop.vision_transformers import config_beside, read_clip
from ldm_jax.metrics.extractors import hash_of
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.vision_transformer import VisionTransformer
from ldm_jax.pictures import CLIP_MEAN, CLIP_STD, cropped

# By code, a tensor that only this tower has.
IMAGE = {
    "transformers": "vision_model.embeddings.patch_embedding.weight",
    "openclip": "visual.conv1.weight",
}
TEXT = {
    "transformers": "text_model.embeddings.token_embedding.weight",
    "openclip": "token_embedding.weight",
}
PROJECTION = {"transformers": "text_projection.weight", "openclip": "text_projection"}
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class ClipScore:
    """100 · max(cos(picture, caption), 0) by both towers of a CLIP (Hessel et al. 2021, eq. 1,
    with 100 for their 2.5).

    Attributes:
      name: of the image tower.
      hash: the first 16 digits of the SHA-256 of the file; of several, of their hashes.
      side: of the pictures that the network sees, in pixels.
      length: of its captions, in tokens.
    """

    name: str
    hash: str
    side: int
    length: int
    _image: VisionTransformer
    _text: CLIPText
    _params: Any
    _batch_size: int = 16

    def __call__(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """The scores float64 (N,) of images uint8 (N, H, W, 3) and their captions; of a caption
        longer than `length`, of what fits (see `cut`).

        Raises:
          ValueError: other shapes, another number of captions, or features that are not finite.
        """
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} pictures and {len(captions)} captions: one for each")
        cosines = (self.images(images) * self.texts(captions)).sum(axis=1)
        return SCALE * np.maximum(cosines, 0.0)

    def images(self, images: np.ndarray) -> np.ndarray:
        """Unit vectors float64 (N, D) of images uint8 (N, H, W, 3)."""
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(
                f"expected images uint8 (N, H, W, 3), got {images.dtype} {images.shape}"
            )

        def pixels(batch):
            return np.float32(cropped(batch, self.side))

        return self._embedded(images, pixels, _of_images, self._image, "picture")

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """Unit vectors float64 (N, D)."""
        tokens = self._tokenizer(list(captions))
        return self._embedded(tokens, lambda batch: batch, _of_texts, self._text, "caption")

    def cut(self, captions: Sequence[str]) -> list[str]:
        """A sentence if captions are longer than the text tower reads; none if all fit."""
        ends = [end for caption in captions if (end := self._tokenizer.overflow(caption))]
        if not ends:
            return []
        return [
            f"clip_score reads {self.length} tokens: {len(ends)} of {len(captions)} captions are "
            f"longer, and were cut; the end of the first, {ends[0]!r}, counts for nothing"
        ]

    @property
    def _tokenizer(self) -> BytePair:
        return BytePair("clip", self.length)

    def _embedded(self, inputs, prepare, embed, network, what) -> np.ndarray:
        """In batches of one size, the last one padded."""
        found, size = [np.zeros((0, network.projection))], self._batch_size
        for start in range(0, len(inputs), size):
            batch = prepare(inputs[start : start + size])
            padded = np.pad(batch, ((0, size - len(batch)), *[(0, 0)] * (batch.ndim - 1)))
            features = np.float64(embed(network, self._params, padded))[: len(batch)]
            with np.errstate(invalid="ignore"):  # said below
                features /= np.linalg.norm(features, axis=1, keepdims=True)
            finite = np.isfinite(features).all(axis=1)
            if not finite.all():
                raise ValueError(
                    f"the features of {what} {start + int(np.argmin(finite))} by {self.name} are "
                    "not finite: the network's weights are broken"
                )
            found.append(features)
        return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=0)
def _of_images(network: VisionTransformer, params: Any, images: jax.Array) -> jax.Array:
    x = (images / 255 - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD)
    with jax.default_matmul_precision("highest"):
        return network.apply({"params": params["image"]}, x)


@functools.partial(jax.jit, static_argnums=0)
def _of_texts(network: CLIPText, params: Any, tokens: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return network.apply({"params": params["text"]}, tokens).pooled


def load_clip(path: str | os.PathLike, batch_size: int = 16) -> ClipScore:
    """The score by the CLIP of a file, or of a folder of transformers or OpenCLIP.

    Heads and the activation are those of config.json or open_clip_config.json beside the weights;
    without one as `vision_transformers.read_clip` says, 64 channels a head.

    Args:
      batch_size: pictures or captions that pass the network together.

    Raises:
      FileNotFoundError, ValueError: the file cannot be read, is no CLIP, holds one tower alone, or
        is of another tokenizer.
    """
    path = Path(path).expanduser()
    weights, path = _opened(path)
    codes = {what: _code(weights, of) for what, of in (("image", IMAGE), ("text", TEXT))}
    if codes["image"] is None and codes["text"] is None:
        raise ValueError(
            f"{path} is no CLIP: it has neither {IMAGE['transformers']} nor {IMAGE['openclip']}, "
            f"but {len(weights)} tensors, such as {', '.join(list(weights)[:3])}"
        )
    for what, other, lacking in (("image", "text", TEXT), ("text", "image", IMAGE)):
        if codes[what] is not None and codes[other] != codes[what]:
            raise ValueError(
                f"{path} holds CLIP's {what} tower alone: the score needs both, and the {other} "
                f"tower has {lacking[codes[what]]}"
            )
    code = codes["text"]
    name, image, image_params = read_clip(weights, path)
    try:
        text, text_params = _read_text(weights, path, code, image.activation)
    except ValueError as error:
        raise ValueError(f"{path}: its text tower {error}") from error
    widths = image.projection, text.projection
    if widths[0] != widths[1]:
        raise ValueError(
            f"{path}: pictures become {widths[0]} numbers and captions {widths[1]}, which have no "
            "cosine: these are not the towers of one CLIP"
        )
    params = jax.device_put({"image": image_params, "text": text_params})
    digest = _hash_of_all(weights)
    return ClipScore(name, digest, image.side, text.max_length, image, text, params, batch_size)


def _opened(path: Path) -> tuple[Tensors, Path]:
    """The tensors, and a file beside which the config would be."""
    if not path.is_dir():
        return open_state(path), path
    for name in OPEN_CLIP_FILES:
        if (path / name).is_file():
            return open_state(path / name), path / name
    return open_shards(path, "model"), path / "model.safetensors"


def _code(weights: Tensors, of: dict[str, str]) -> str | None:
    return next((code for code, name in of.items() if name in weights), None)


def _read_text(
    weights: Tensors, path: Path, code: str, activation: str
) -> tuple[CLIPText, dict[str, Any]]:
    theirs = code == "openclip"
    own = weights.renamed({n: n for n in weights if not n.startswith(("visual", "vision_model."))})
    projection = PROJECTION[code]
    if projection not in own:
        raise ValueError(f"lacks {projection}: without it captions have no cosine with pictures")
    fields = text_fields("openclip" if theirs else "clip", Shapes(own))
    config = config_beside(path)
    described = config.get("text_config") or config.get("model_cfg", {}).get("text_cfg") or {}
    fields["heads"] = described.get("num_attention_heads", described.get("heads", fields["heads"]))
    fields["activation"] = described.get("hidden_act", activation)
    fields["epsilon"] = described.get("layer_norm_eps", 1e-5)
    fields["projection"] = own.shape(projection)[1 if theirs else 0]
    inner = ".mlp.c_fc.weight" if theirs else ".mlp.fc1.weight"
    fields["mlp_width"] = next((own.shape(n)[0] for n in own if n.endswith(inner)), None)
    known = BytePair("clip", fields["max_length"]).size
    if fields["vocab_size"] != known:
        raise ValueError(
            f"knows {fields['vocab_size']} pieces of text, and CLIP's tokenizer has {known}: it is "
            "of another tokenizer"
        )
    table = slots("clip", fields, "openclip" if theirs else "compvis")
    params, report = read_params(own, table)
    if report.missing or report.misshapen:
        raise ValueError(f"does not fit: {(*report.missing, *report.misshapen)[0]}")
    return CLIPText(**fields), params


def _hash_of_all(weights: Tensors) -> str:
    files = sorted({weights.place(name).removesuffix(f": {name}") for name in weights})
    hashes = [hash_of(file) for file in files]
    several = hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
    return hashes[0] if len(hashes) == 1 else several
