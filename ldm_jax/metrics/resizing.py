"""How pictures come to the size of a network, which moves every distance between features.

| resize | what | who uses it |
|---|---|---|
| `legacy` | bilinear between half-pixel centres, not antialiased, in float32 | pytorch-fid |
| `clean` | Pillow's bicubic, antialiased, each channel in float32, clipped to 0 … 255 | clean-fid |
| `adm` | bilinear between pixels' corners, not antialiased: TensorFlow 1's | ADM's evaluator, torch-fidelity, the original FID |
| `cubic` | antialiased cubic of `jax.image`, clipped | the default extractor |

Parmar et al. 2022 (arXiv 2104.11222) show what the first and the third do to a distance.
"""  # noqa: E501

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image


def bilinear_matrix(before: int, after: int, centres: bool) -> np.ndarray:
    """float32 (after, before): bilinear resizing of one axis, not antialiased.

    `centres`: whether pixel i is at i + ½ (torch's align_corners=False) or at i (TensorFlow 1's).
    """
    step = np.float32(before) / np.float32(after)
    place = np.arange(after, dtype=np.float32)
    at = (place + np.float32(0.5)) * step - np.float32(0.5) if centres else place * step
    at = np.maximum(at, 0)
    low = np.floor(at).astype(int)
    share = (at - low).astype(np.float32)
    matrix = np.zeros((after, before), np.float32)
    np.add.at(matrix, (np.arange(after), np.minimum(low, before - 1)), 1 - share)
    np.add.at(matrix, (np.arange(after), np.minimum(low + 1, before - 1)), share)
    return matrix


def _bilinear(centres: bool) -> Callable[[jax.Array, int], jax.Array]:
    def resized(images, side):
        rows, columns = (bilinear_matrix(n, side, centres) for n in images.shape[1:3])
        high = jax.lax.Precision.HIGHEST
        images = jnp.einsum("Ww,bhwc->bhWc", columns, images, precision=high)
        return jnp.einsum("Hh,bhWc->bHWc", rows, images, precision=high)

    return resized


def _cubic(images: jax.Array, side: int) -> jax.Array:
    shape = (len(images), side, side, images.shape[-1])
    return jnp.clip(jax.image.resize(images, shape, "cubic", antialias=True), 0, 255)


# Of images (B, H, W, C) float in 0 … 255 under jit.
ON_DEVICE: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    "legacy": _bilinear(True),
    "adm": _bilinear(False),
    "cubic": _cubic,
}
RESIZES = ("legacy", "clean", "adm", "cubic")


def clean(images: np.ndarray, side: int) -> np.ndarray:
    """float32 (N, H, W, C) in 0 … 255 → (N, side, side, C), as clean-fid does to the last bit."""
    if images.shape[1:3] == (side, side):
        return images  # the kernel's own values at its knots: nothing changes
    resized = np.empty((len(images), side, side, images.shape[-1]), np.float32)
    for i, image in enumerate(images):
        for c in range(image.shape[-1]):
            plane = Image.fromarray(image[..., c])
            resized[i, ..., c] = plane.resize((side, side), Image.Resampling.BICUBIC)
    return np.clip(resized, 0, 255, out=resized)
