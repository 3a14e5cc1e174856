"""Networks that make features of pictures, for the distances and retrieval of this package.

`load_extractor()` is EfficientNet-Lite0, from a package on PyPI. `load_extractor(path)` reads the
networks of published numbers from the files people have, and recognises them by their tensors:
FID's Inception-v3, DINOv2 and CLIP's image towers. Nothing is downloaded. A number is only
comparable with one of the same network, resize and number of pictures.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ldm_jax.interop import vision_transformers
from ldm_jax.interop.files import Tensors, open_state
from ldm_jax.metrics import efficientnet, inception
from ldm_jax.metrics.array_pickle import is_array_pickle, open_array_pickle
from ldm_jax.metrics.resizing import ON_DEVICE, RESIZES, clean
from ldm_jax.models.efficientnet import EfficientNetLite0
from ldm_jax.models.inception import InceptionV3
from ldm_jax.pictures import CLIP_MEAN, CLIP_STD


@dataclasses.dataclass(frozen=True)
class Extractor:
    """Features of pictures, by a network of known weights.

    Attributes:
      name: of the network.
      hash: the first 16 digits of the SHA-256 of its file.
      resize: one of `ldm_jax.metrics.resizing.RESIZES`.
      side: of the pictures that the network sees, in pixels.
      width: of the features.
      logits: whether it makes logits of classes too, for the Inception score.
    """

    name: str
    hash: str
    resize: str
    side: int
    width: int
    logits: bool
    _network: Callable[[Any, jax.Array], Any]
    _params: Any
    _batch_size: int = 16

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 (N, width) of images (N, H, W, 3), uint8 or float in [0, 1]. See `measure`."""
        return self.measure(images)[0]

    def measure(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Features (N, width), and logits (N, classes) or None, both float32.

        Every batch has one size, the last one padded: one compilation per image size.

        Raises:
          ValueError: other shapes, or features that are not finite.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
            raise ValueError(f"expected images of shape (N, H, W, 3), got {images.shape}")
        found: list[tuple[np.ndarray, ...]] = []
        for start in range(0, len(images), self._batch_size):
            batch = images[start : start + self._batch_size]
            scale = 1.0 if batch.dtype == np.uint8 else 255.0
            batch, count = batch.astype(np.float32) * np.float32(scale), len(batch)
            if self.resize == "clean":
                batch = clean(batch, self.side)
            padded = np.pad(batch, ((0, self._batch_size - count), (0, 0), (0, 0), (0, 0)))
            outputs = [np.asarray(o)[:count] for o in self._network(self._params, padded)]
            finite = np.isfinite(outputs[0]).all(axis=1)
            if not finite.all():
                raise ValueError(
                    f"the features of picture {start + int(np.argmin(finite))} by {self.name} are "
                    "not finite: its pixels, or the network's weights, hold NaN"
                )
            found.append(tuple(outputs))
        if not found:
            return np.zeros((0, self.width), np.float32), None
        features, *logits = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return features, logits[0] if logits else None


def load_extractor(
    path: str | os.PathLike = "", resize: str = "", batch_size: int = 16
) -> Extractor:
    """The extractor of a file, or EfficientNet-Lite0 ("").

    Args:
      path: safetensors, a torch checkpoint, or of Inception-v3 jax-fid's pickle.
      resize: one of `RESIZES`; "": "clean", and "cubic" for EfficientNet-Lite0.
      batch_size: pictures that pass the network together.

    Raises:
      ImportError: no path, and the package of EfficientNet-Lite0 is not installed.
      FileNotFoundError, ValueError: the file cannot be read, or is none of these networks.
    """
    if resize and resize not in RESIZES:
        raise ValueError(f"resize={resize!r}: choose one of {', '.join(RESIZES)}")
    resize = resize or ("clean" if path else "cubic")
    path = Path(path).expanduser() if path else efficientnet.weights_path()
    weights = open_array_pickle(path) if is_array_pickle(path) else open_state(path)
    if inception.JAX_KEY in weights:
        weights = inception.in_torch_names(weights)
    for recognised, read in READERS:
        if recognised(weights):
            name, network, params, side, norm = read(weights, path, resize)
            break
    else:
        raise ValueError(
            f"{path} is none of the networks that measure pictures: FID's Inception-v3 (it has "
            f"{inception.KEY}), DINOv2 (patch_embed.proj.weight and blocks.*, or "
            "embeddings.patch_embeddings.*) and CLIP's image tower (visual.* or vision_model.*); "
            f"it holds {len(weights)} tensors, such as {', '.join(list(weights)[:3])}"
        )
    side_of = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), side_of)["params"]
    _check(params, shapes, path)

    @jax.jit
    def forward(params, images):
        if resize in ON_DEVICE:
            images = ON_DEVICE[resize](images, side)
        found = network.apply({"params": params}, norm(images))
        return found if isinstance(found, tuple) else (found,)

    features, *logits = jax.eval_shape(forward, shapes, side_of)
    return Extractor(
        name,
        hash_of(path),
        resize,
        side,
        features.shape[-1],
        bool(logits),
        forward,
        jax.device_put(params),
        batch_size,
    )


def hash_of(path: str | os.PathLike) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


Read = tuple[str, nn.Module | SimpleNamespace, Any, int, Callable[[jax.Array], jax.Array]]


def _efficientnet(weights: Tensors, path: Path, resize: str) -> Read:
    params = efficientnet.read_efficientnet(weights)
    return "efficientnet-lite0", EfficientNetLite0(), params, 224, lambda x: x / 127.5 - 1


def _inception(weights: Tensors, path: Path, resize: str) -> Read:
    """pytorch-fid takes 0 … 255 to −1 … 1; TensorFlow's graph, and clean-fid, (x − 128) / 128."""
    norm = (lambda x: x / 127.5 - 1) if resize == "legacy" else (lambda x: (x - 128) / 128)
    network, params = InceptionV3(), inception.read_inception(weights)
    if inception.features_alone(weights):
        both = network.apply
        network = SimpleNamespace(init=network.init, apply=lambda *given: both(*given)[0])
    return "inception-v3-fid", network, params, 299, norm


def _transformer(read: Callable, mean: tuple, std: tuple) -> Callable:
    def reader(weights: Tensors, path: Path, resize: str) -> Read:
        name, network, params = read(weights, path)
        norm = lambda x: (x / 255 - jnp.asarray(mean)) / jnp.asarray(std)  # noqa: E731
        return name, network, params, network.side, norm

    return reader


def _has(*names: str) -> Callable[[Tensors], bool]:
    return lambda weights: any(name in weights for name in names)


_DINO, _CLIP = vision_transformers.read_dino, vision_transformers.read_clip
READERS = (
    (_has(inception.KEY), _inception),
    (
        _has("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight"),
        _transformer(_DINO, vision_transformers.DINO_MEAN, vision_transformers.DINO_STD),
    ),
    (
        _has("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
        _transformer(_CLIP, CLIP_MEAN, CLIP_STD),
    ),
    (_has("_blocks.0._depthwise_conv.weight"), _efficientnet),
)


def _check(params: Any, shapes: Any, path: Path) -> None:
    """Raises ValueError where the file's parameters are not those of the network."""
    ours = {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(params)}
    wanted = {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(shapes)}
    for name in sorted(ours.keys() | wanted.keys()):
        if ours.get(name) != wanted.get(name):
            raise ValueError(
                f"{path} does not fit the network that its names announce: {name} is "
                f"{ours.get(name, 'missing')}, and {wanted.get(name, 'nothing')} is expected"
            )
