"""The kinds of condition: each a pure function (example, rng) -> entries of the batch, with its
parameters as fields. `data/conditions.py` chooses and checks them.

They see the example as the augmentations left it, and bring what they read from files beside the
picture (`picture.depth.png` beside `picture.jpg`) to the same place through its `Placement`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image

from ldm_jax.data.degradations import DEGRADATIONS, degraded
from ldm_jax.data.masks import RECIPES, draw_mask
from ldm_jax.pictures import to_signed

Example = dict[str, Any]


class Condition(Protocol):
    """Makes `entries` of an example; reads `picture.SUFFIX` beside it, "" for no file, unless the
    example has the entry `instead`."""

    name: str
    suffix: str
    instead: str

    @property
    def entries(self) -> tuple[str, ...]: ...

    def __call__(self, example: Example, rng: np.random.Generator) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Named:
    """A condition that makes one entry, named after its section, and reads no file."""

    name: str
    suffix: ClassVar[str] = ""
    instead: ClassVar[str] = ""

    @property
    def entries(self) -> tuple[str, ...]:
        return (self.name,)


@dataclasses.dataclass(frozen=True)
class Mask(Named):
    """A random mask, float32 (H, W, 1), 1 where the model is to draw.

    `recipe` is one of `masks.RECIPES`; with probability `whole` all of the picture is masked, as in
    the training of Stable Diffusion's inpainting model (0.25).
    """

    recipe: str = "lama"
    whole: float = 0.0

    def __post_init__(self):
        if self.recipe not in RECIPES:
            raise ValueError(
                f"data.conditions.{self.name}.recipe={self.recipe!r}: choose one of "
                f"{', '.join(RECIPES)}"
            )

    def __call__(self, example, rng):
        height, width = example["image"].shape[:2]
        mask = draw_mask(RECIPES[self.recipe], height, width, rng)
        if rng.random() < self.whole:
            mask = np.ones_like(mask)
        return {self.name: mask[..., None].astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class LowResolution(Named):
    """The picture shrunk `factor` times, float32 (h, w, 3) in [−1, 1].

    `degradation` is one of `degradations.DEGRADATIONS`: a filter of Pillow, or BSRGAN's blur, noise
    and compression, "bsrgan" or "bsrgan_light".

    With `noise_levels` N, noise is added, of a random timestep below N of DDPM's schedule (linear β
    from 1e-4 to 0.02 in 1,000 steps), and the timestep becomes the entry `noise_level`, int32, as
    in the training of Stable Diffusion 2's upscaler (N = 350).
    """

    factor: int = 4
    noise_levels: int = 0
    degradation: str = "pil_bicubic"

    def __post_init__(self):
        if self.degradation not in DEGRADATIONS:
            raise ValueError(
                f"data.conditions.{self.name}.degradation={self.degradation!r}: choose one of "
                f"{', '.join(DEGRADATIONS)}"
            )

    @property
    def entries(self):
        return (self.name, "noise_level") if self.noise_levels else (self.name,)

    def __call__(self, example, rng):
        image = example["image"]
        height, width = image.shape[:2]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"data.conditions.{self.name}.factor={self.factor} does not divide pictures of "
                f"{height}×{width}"
            )
        small = to_signed(degraded(image, self.factor, self.degradation, rng))
        if not self.noise_levels:
            return {self.name: small}
        level = int(rng.integers(self.noise_levels))
        kept = np.prod(1.0 - np.linspace(1e-4, 0.02, 1000)[: level + 1])
        noise = rng.standard_normal(small.shape)
        noisy = np.sqrt(kept) * small + np.sqrt(1.0 - kept) * noise
        return {self.name: noisy.astype(np.float32), "noise_level": np.int32(level)}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """SDXL's sizes: `original_size` of the file, `crop`, (top, left) of the picture in the resized
    file, and `target_size` of the picture, float32 (2,) in pixels; `aesthetic_score`, a constant.
    """

    name: str
    aesthetic_score: float = 6.0
    suffix: ClassVar[str] = ""
    instead: ClassVar[str] = ""
    entries: ClassVar[tuple[str, ...]] = (
        "original_size",
        "crop",
        "target_size",
        "aesthetic_score",
    )

    def __call__(self, example, rng):
        del rng
        where = example["placement"]
        parts = (where.original, where.corner, where.size, (self.aesthetic_score,))
        return {n: np.float32(p) for n, p in zip(self.entries, parts, strict=True)}


@dataclasses.dataclass(frozen=True)
class Segmentation(Named):
    """Classes of the pixels, int32 (H, W), from a label picture beside the picture.

    Grey or palette, 8 or 16 bits, of any size: a value is a class, below `classes`. Where the
    picture reaches outside of the file, the file's edge is repeated. Scenes have theirs in the
    entry `segmentation`.
    """

    classes: int = 182
    suffix: str = "segmentation.png"
    instead: ClassVar[str] = "segmentation"

    def __call__(self, example, rng):
        del rng
        if self.instead in example:
            path, labels = example["name"], example["segmentation"]
        else:
            path, labels = _map_beside(example, self)
        labels = labels.astype(np.int32)
        if labels.max() >= self.classes or labels.min() < 0:
            raise ValueError(
                f"{path}: class {labels.max()}, but data.conditions.{self.name}.classes is "
                f"{self.classes}"
            )
        return {self.name: example["placement"].apply(labels, smooth=False)}


@dataclasses.dataclass(frozen=True)
class Depth(Named):
    """Inverse depth (near is bright) from a grey picture beside the picture, float32 (h, w, 1).

    It is shrunk `factor` times, to the size of the latents, then scaled to [−1, 1] for each
    picture, as in Stable Diffusion 2. A constant map becomes 0.
    """

    factor: int = 8
    suffix: str = "depth.png"

    def __call__(self, example, rng):
        del rng
        _, depth = _map_beside(example, self)
        small = _shrunk(example, depth, self.factor, Image.Resampling.BICUBIC)
        low, high = small.min(), small.max()
        stretched = 2.0 * (small - low) / (high - low) - 1.0 if high > low else 0.0 * small
        return {self.name: stretched[..., None].astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class LossMask(Named):
    """How much of the loss counts, float32 (h, w, 1) in [0, 1], from a grey picture beside the
    picture: all where it is white, the share `unmasked` where it is black (masked training).

    It is shrunk `factor` times, to the size of the latents.
    """

    factor: int = 8
    unmasked: float = 0.0
    suffix: str = "mask.png"

    def __post_init__(self):
        if not 0.0 <= self.unmasked <= 1.0:
            raise ValueError(f"data.conditions.{self.name}.unmasked={self.unmasked}: choose 0 … 1")

    def __call__(self, example, rng):
        del rng
        path, mask = _map_beside(example, self)
        if not np.any(mask):
            raise ValueError(f"{path} is black: white is what the model is to learn")
        white = {1: 255, 2: 65535, 4: 65535}[mask.itemsize] if mask.dtype != bool else 1
        mask = _shrunk(example, mask / white, self.factor, Image.Resampling.BOX)
        share = self.unmasked + (1.0 - self.unmasked) * np.clip(mask, 0.0, 1.0)
        return {self.name: share[..., None].astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class Edges(Named):
    """The `edges` of the picture, a hint for a ControlNet, float32 (H, W, 1) in [0, 1]."""

    sigma: float = 0.7
    gain: float = 4.0

    def __call__(self, example, rng):
        del rng
        return {self.name: edges(example["image"], self.sigma, self.gain)}


@dataclasses.dataclass(frozen=True)
class Hint(Named):
    """Another picture, `picture.NAME.png` beside the picture, float32 (H, W, 3) in [0, 1]: edges,
    depth or a pose, for a ControlNet. Grey ones get three equal channels."""

    @property
    def suffix(self) -> str:
        return f"{self.name}.png"

    def __call__(self, example, rng):
        del rng
        with Image.open(beside(example, self)) as file:
            pixels = np.asarray(file.convert("RGB"))
        return {self.name: np.float32(example["placement"].apply(pixels, smooth=True)) / 255.0}


@dataclasses.dataclass(frozen=True)
class Boxes(Named):
    """Objects as the tokens of LDM's layout models, int32 (3·objects + 2,).

    Beside the picture lies a JSON list of {"category_id": 0 …, "bbox": [left, top, width, height]}
    in pixels of the file, as COCO has them; scenes, and folders with `data.annotations`, have
    theirs in the entries `categories` and `boxes`. An object is three tokens: its category, the
    corner above left and the one below right on a 90 × 90 grid over the picture; two more say which
    part of the file the picture is. Objects outside of the picture or smaller than `min_area` of it
    are left out; of more than `objects`, the first after shuffling stay. Places without an object
    hold `tokens` − 1 (taming-transformers' ObjectsBoundingBoxConditionalBuilder).
    """

    objects: int = 30
    tokens: int = 8192
    min_area: float = 1e-4
    suffix: str = "boxes.json"
    instead: ClassVar[str] = "categories"

    def __call__(self, example, rng):
        if self.instead in example:
            where, categories, boxes = example["name"], example["categories"], example["boxes"]
        else:
            where, categories, boxes = self.read(beside(example, self))
        if categories.size and not 0 <= categories.min() <= categories.max() < self.tokens - 1:
            raise ValueError(f"{where}: categories lie in 0 … {self.tokens - 2}")
        height, width = example["placement"].original
        boxes = boxes + np.pad(boxes[:, :2], ((0, 0), (2, 0)))
        boxes = boxes / (width, height, width, height)
        boxes = np.clip(example["placement"].boxes(boxes), 0.0, 1.0)
        area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        kept = rng.permutation(np.flatnonzero(area >= self.min_area))[: self.objects]
        triples = np.full((self.objects, 3), self.tokens - 1, np.int32)
        triples[: len(kept), 0] = categories[kept]
        triples[: len(kept), 1:] = self._corners(boxes[kept])
        crop = self._corners(_window_in_file(example["placement"])[None])
        return {self.name: np.concatenate([triples.ravel(), crop.ravel()]).astype(np.int32)}

    def _corners(self, boxes: np.ndarray) -> np.ndarray:
        """Tokens (N, 2) of boxes (N, 4), which are relative to the picture."""
        sections = int(self.tokens**0.5)
        places = np.round(np.clip(boxes, 0.0, 1.0) * (sections - 1)).astype(np.int32)
        return places[:, 1::2] * sections + places[:, ::2]

    def read(self, path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
        """The path, categories (N,), and boxes (N, 4) as they lie in the file."""
        try:
            objects = json.loads(path.read_text(encoding="utf-8"))
            categories = np.array([int(o["category_id"]) for o in objects], np.int64)
            boxes = np.array([o["bbox"] for o in objects], np.float64).reshape(-1, 4)
        except (ValueError, KeyError, TypeError) as error:
            expected = '[{"category_id": 0, "bbox": [left, top, width, height]}, …]'
            raise ValueError(f"{path}: expected {expected} ({error!r})") from error
        return path, categories, boxes


@dataclasses.dataclass(frozen=True)
class Array(Named):
    """An array from `picture.NAME.npy` beside the picture, float32 or int32, unchanged."""

    @property
    def suffix(self) -> str:
        return f"{self.name}.npy"

    def __call__(self, example, rng):
        del rng
        path = beside(example, self)
        try:
            array = np.load(path, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path} is no array of numbers: {error}") from error
        whole = np.issubdtype(array.dtype, np.integer)
        return {self.name: array.astype(np.int32 if whole else np.float32)}


def edges(image: np.ndarray, sigma: float = 0.7, gain: float = 4.0) -> np.ndarray:
    """The edges of a picture, uint8 (H, W, 3) → float32 (H, W, 1) in [0, 1], white on black: the
    size of the gradient of its brightness, after a Gaussian of `sigma` pixels, times `gain`."""
    from scipy import ndimage  # slow to import

    grey = np.float32(image).mean(axis=-1) / 255.0
    size = ndimage.gaussian_gradient_magnitude(grey, sigma, mode="nearest")
    return np.clip(gain * size, 0.0, 1.0)[..., None].astype(np.float32)


def beside(example: Example, condition: Condition) -> Path:
    """The file of a condition beside the picture of an example."""
    return Path(example["path"]).with_suffix(f".{condition.suffix}")


def _map_beside(example: Example, condition: Condition) -> tuple[Path, np.ndarray]:
    """Path and pixels (h, w) of a one-channel picture beside the example's."""
    path = beside(example, condition)
    with Image.open(path) as file:
        pixels = np.asarray(file)
    if pixels.ndim != 2:
        raise ValueError(
            f"{path} has {pixels.shape[-1]} channels: expected a grey or palette picture"
        )
    return path, pixels


def _shrunk(example: Example, pixels: np.ndarray, factor: int, filter: int) -> np.ndarray:
    """Pixels (h, w) of a file, float32, brought to the picture's place and shrunk."""
    placed = example["placement"].apply(pixels.astype(np.float32), smooth=True)
    size = (placed.shape[1] // factor, placed.shape[0] // factor)
    return np.asarray(Image.fromarray(placed).resize(size, filter))


def _window_in_file(placement: Any) -> np.ndarray:
    """(left, top, right, bottom) of the picture relative to the resized file."""
    (top, left), (height, width) = placement.corner, placement.size
    rows, columns = placement.resized
    return np.array([left / columns, top / rows, (left + width) / columns, (top + height) / rows])


CONDITIONS = {
    "mask": Mask,
    "low_resolution": LowResolution,
    "sizes": Sizes,
    "segmentation": Segmentation,
    "depth": Depth,
    "loss_mask": LossMask,
    "boxes": Boxes,
    "edges": Edges,
    "hint": Hint,
    "array": Array,
}
