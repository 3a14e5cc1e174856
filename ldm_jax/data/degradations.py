"""Small pictures of low quality from large ones: what super-resolution learns to undo.

`shrink` is one of Pillow's filters. `degrade` is BSRGAN's model (Zhang et al. 2021, "Designing a
Practical Degradation Model for Deep Blind Image Super-Resolution") as LDM uses it (Rombach et al.
2022, §D.6.1), full or light: blur, two shrinkings, noise and JPEG in random order. Its random
numbers are drawn in another way than in the original code, from the same distributions; its camera
noise, which LDM does not use, is left out.
"""

import dataclasses
import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

Rng = np.random.Generator
FILTERS = {f"pil_{kind.name.lower()}": kind for kind in Image.Resampling}
INTERPOLATIONS = ("linear", "cubic", "area")  # as OpenCV has them


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The numbers of a variant; ranges are of whole numbers and include both ends.

    Attributes:
      blurs: how many blurs there are.
      width: factor of the widths of blurs.
      kernel: multiplier of a blur kernel's random size.
      isotropic: of that size, without anisotropy.
      free: probability that the first shrinking is a resize by a random factor.
      noise: standard deviation, in 1/255.
      quality: of JPEG.
    """

    blurs: int
    width: float
    kernel: int
    isotropic: tuple[int, int]
    free: float
    noise: tuple[int, int]
    quality: tuple[int, int]


RECIPES = {
    "bsrgan": Recipe(2, 1.0, 2, (2, 11), 0.75, (2, 25), (30, 95)),
    "bsrgan_light": Recipe(1, 0.25, 1, (2, 4), 0.8, (1, 2), (80, 95)),
}
DEGRADATIONS = (*FILTERS, *RECIPES)


def degraded(image: np.ndarray, factor: int, name: str, rng: Rng) -> np.ndarray:
    """The picture, uint8 (H, W, 3), `factor` times smaller, by one of DEGRADATIONS."""
    if name in FILTERS:
        return shrink(image, factor, name)
    return degrade(image, factor, RECIPES[name], rng)


def shrink(image: np.ndarray, factor: int, name: str = "pil_bicubic") -> np.ndarray:
    """By one of FILTERS, antialiased."""
    size = (image.shape[1] // factor, image.shape[0] // factor)
    return np.asarray(Image.fromarray(image).resize(size, FILTERS[name]))


def degrade(image: np.ndarray, factor: int, recipe: Recipe, rng: Rng) -> np.ndarray:
    """uint8 (H, W, 3) → uint8 (H/factor, W/factor, 3), by a recipe."""
    from scipy import ndimage  # slow to import

    x = image.astype(np.float64) / 255.0
    if factor == 4 and rng.random() < 0.25:
        kind = rng.choice(INTERPOLATIONS) if rng.random() < 0.5 else "antialiased"
        x = np.clip(resize(x, (x.shape[0] // 2, x.shape[1] // 2), kind), 0.0, 1.0)
        factor = 2
    final = (x.shape[0] // factor, x.shape[1] // factor)

    def blurred(x):
        return _filtered(x, blur_kernel(factor, recipe, rng))

    def smaller(x):
        if rng.random() < recipe.free:
            scale = rng.uniform(1.0, 2.0 * factor)
            size = tuple(max(1, int(side / scale)) for side in x.shape[:2])
            return np.clip(resize(x, size, rng.choice(INTERPOLATIONS)), 0.0, 1.0)
        kernel = gaussian_kernel(25, np.eye(2) * rng.uniform(0.1, 0.6 * factor) ** 2)
        # Every `factor`-th pixel of a picture that is moved, so that they lie in the middle.
        kernel = ndimage.shift(kernel, (factor - 1) / -2.0, order=1, mode="nearest")
        return np.clip(_filtered(x, kernel / kernel.sum())[::factor, ::factor], 0.0, 1.0)

    def of_final_size(x):
        return np.clip(resize(x, final, rng.choice(INTERPOLATIONS)), 0.0, 1.0)

    def noisy(x):
        return np.clip(x + noise(x.shape, recipe, rng), 0.0, 1.0)

    def compressed(x):
        return jpeg(x, recipe, rng) if rng.random() < 0.9 else x

    steps: list[Callable] = [blurred] * recipe.blurs + [smaller, of_final_size, noisy, compressed]
    order = [steps[i] for i in rng.permutation(len(steps))]
    first, second = sorted((order.index(smaller), order.index(of_final_size)))
    order[first], order[second] = smaller, of_final_size
    for step in order:
        x = step(x)
    return _to_bytes(jpeg(x, recipe, rng))


def blur_kernel(factor: int, recipe: Recipe, rng: Rng) -> np.ndarray:
    """A Gaussian of random widths and angle, or, every other time, of one width."""
    if rng.random() < 0.5:
        size = recipe.kernel * rng.integers(2, 12) + 3
        variances = recipe.width * (4 + factor) * rng.random(2)
        angle = rng.random() * np.pi
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        return gaussian_kernel(size, turn @ np.diag(variances) @ turn.T)
    low, high = recipe.isotropic
    size = recipe.kernel * rng.integers(low, high + 1) + 3
    width = recipe.width * (2 + 0.2 * factor) * rng.random()
    return gaussian_kernel(size, np.eye(2) * width**2)


def gaussian_kernel(size: int, covariance: np.ndarray) -> np.ndarray:
    """(size, size), of sum 1; a covariance near 0 gives a single pixel."""
    at = np.arange(size) - (size - 1) / 2.0
    places = np.stack(np.meshgrid(at, at), axis=-1)
    inverse = np.linalg.inv(covariance + 1e-6 * np.eye(2))
    exponent = -0.5 * np.einsum("yxi,ij,yxj->yx", places, inverse, places)
    kernel = np.exp(exponent - exponent.max())
    return kernel / kernel.sum()


def noise(shape: Sequence[int], recipe: Recipe, rng: Rng) -> np.ndarray:
    """Gaussian noise: by channel, grey, or of channels that vary together."""
    low, high = recipe.noise
    level, kind = rng.integers(low, high + 1) / 255.0, rng.random()
    if kind > 0.6:
        return level * rng.standard_normal(shape)
    if kind < 0.4:
        return level * rng.standard_normal((*shape[:2], 1))
    basis, _ = np.linalg.qr(rng.random((3, 3)))
    covariance = np.abs((high / 255.0) ** 2 * (basis.T @ np.diag(rng.random(3)) @ basis))
    return rng.multivariate_normal(np.zeros(3), covariance, shape[:2], check_valid="ignore")


def jpeg(x: np.ndarray, recipe: Recipe, rng: Rng) -> np.ndarray:
    """The picture, in [0, 1], after JPEG of a random quality."""
    low, high = recipe.quality
    file = io.BytesIO()
    Image.fromarray(_to_bytes(x)).save(file, "JPEG", quality=int(rng.integers(low, high + 1)))
    return np.asarray(Image.open(file)).astype(np.float64) / 255.0


def resize(x: np.ndarray, size: Sequence[int], kind: str) -> np.ndarray:
    """(H, W, C) → (*size, C), in one of INTERPOLATIONS or "antialiased".

    OpenCV's "linear" and "cubic" (a = −¾) look at the nearest pixels only, however much smaller the
    result; "antialiased" is MATLAB's bicubic (a = −½), wider the smaller it is.
    """
    for axis, length in enumerate(size):
        x = np.moveaxis(np.tensordot(_weights(x.shape[axis], length, kind), x, (1, axis)), 0, axis)
    return x


def _weights(old: int, new: int, kind: str) -> np.ndarray:
    """(new, old), rows of sum 1; pixels beyond the edge are those at the edge."""
    scale = old / new
    if kind == "area" and scale > 1.0:
        ends = np.arange(new + 1) * scale
        low, high = ends[:-1, None], ends[1:, None]
        pixels = np.arange(old)
        return np.clip(np.minimum(high, pixels + 1) - np.maximum(low, pixels), 0.0, None) / scale
    wide = max(scale, 1.0) if kind == "antialiased" else 1.0
    centres = (np.arange(new) + 0.5) * scale - 0.5
    reach = int(np.ceil(2 * wide)) + 1
    near = np.floor(centres)[:, None].astype(int) + np.arange(-reach, reach + 1)
    distance = np.abs(near - centres[:, None]) / wide
    values = _triangle(distance) if kind in ("linear", "area") else _cubic(distance, kind)
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new)[:, None], np.clip(near, 0, old - 1)), values)
    return weights / weights.sum(1, keepdims=True)


def _triangle(distance: np.ndarray) -> np.ndarray:
    return np.clip(1.0 - distance, 0.0, None)


def _cubic(distance: np.ndarray, kind: str) -> np.ndarray:
    """Keys 1981."""
    a, d = -0.5 if kind == "antialiased" else -0.75, distance
    inner = (a + 2) * d**3 - (a + 3) * d**2 + 1
    outer = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, inner, np.where(d < 2, outer, 0.0))


def _filtered(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    from scipy import ndimage  # slow to import

    return ndimage.convolve(x, kernel[..., None], mode="mirror")


def _to_bytes(x: np.ndarray) -> np.ndarray:
    return np.round(np.clip(x, 0.0, 1.0) * 255.0).astype(np.uint8)
