"""How well pictures show what a model was told of a scene: one judge for each kind of condition."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy import sparse
from scipy.sparse.linalg import spsolve

from ldm_jax.data.condition_kinds import edges
from ldm_jax.data.scene_drawing import stamp
from ldm_jax.data.scenes import Scene, SceneSource
from ldm_jax.metrics.intervals import Interval, bootstrap, mean_interval, wilson
from ldm_jax.metrics.scene_reader import Found, answers, read_scene

Example = dict[str, Any]
OVERLAP = 0.5  # intersection over union of boxes from which an object is in its place


def judge(
    images: np.ndarray,
    told: set[str],
    examples: Sequence[Example],
    scenes: Sequence[Scene],
    source: SceneSource,
) -> dict[str, float]:
    """The metrics of all that the model was told.

    - caption: `objects`, `relation`, `count` and `scene`, of `scene_reader.score`;
    - label: `class`, the share whose only kind is the right one;
    - boxes: `boxes`, the share of the objects that are found in their box;
    - segmentation: `miou`, the mean intersection over union of the classes read back;
    - mask: `masked_psnr` [dB] of the masked pixels; `mean_colour_psnr`, that of the mean of the
      pixels that are known, and `biharmonic_psnr`, of the smoothest surface through them;
      `known_error`, the largest change of a known pixel, in 8-bit steps;
    - low_resolution: `agreement` [dB], the PSNR of the pictures, shrunk again, beside what the
      model was told; `drawn_psnr` of the pictures, and `bicubic_psnr` of that, enlarged;
    - control, of edges: `edge_correlation` of a picture's edges with those it was to follow.

    Args:
      images: uint8 (N, H, W, 3).
      told: entries of examples; those without a judge are left out.
      examples: N, with these entries.
      scenes: N.
      source: of the scenes.
    """
    return judge_with_intervals(images, told, examples, scenes, source)[0]


def judge_with_intervals(
    images: np.ndarray,
    told: set[str],
    examples: Sequence[Example],
    scenes: Sequence[Scene],
    source: SceneSource,
    seed: int = 0,
) -> tuple[dict[str, float], dict[str, Interval]]:
    """`judge`, and 95 % intervals of what depends on the drawing: Wilson's of shares, and of the
    others the bootstrap's over pictures."""
    metrics: dict[str, float] = {}
    intervals: dict[str, Interval] = {}
    for entry in sorted(told & JUDGES.keys()):
        for name, found in JUDGES[entry](images, examples, scenes, source).items():
            if isinstance(found, float):
                metrics[name] = found
            elif isinstance(found, tuple):  # sums over pictures, and what to make of them
                parts, of = found
                metrics[name] = of(*(part.sum(axis=0) for part in parts))
                intervals[name] = bootstrap(parts, of, seed=seed)
            else:
                values = np.asarray(found)
                metrics[name] = float(values.mean()) if len(values) else float("nan")
                share = values.dtype == bool
                intervals[name] = (
                    wilson(int(values.sum()), len(values))
                    if share or not len(values)
                    else mean_interval(values, seed=seed)
                )
    return metrics, intervals


# What a judge finds: a list of booleans is a share, an array a mean, a float is as it is, and
# arrays with a function are that function of their sums.


def _caption(images, examples, scenes, source):
    return answers(images, scenes, source)


def _label(images, examples, scenes, source):
    return {"class": answers(images, scenes, source)["objects"]}


def _boxes(images, examples, scenes, source):
    right = []
    for scene, found in zip(scenes, read_scene(images, source), strict=True):
        for placed in scene.objects:
            box = source.box(placed)
            overlaps = [overlap(one.box, box) for one in found if one.kind == placed.kind]
            right.append(max(overlaps, default=0.0) >= OVERLAP)
    return {"boxes": [bool(one) for one in right]}


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, width, height)."""
    inside = 1.0
    for axis in (0, 1):
        end = min(a[axis] + a[axis + 2], b[axis] + b[axis + 2])
        inside *= max(0.0, end - max(a[axis], b[axis]))
    return inside / (a[2] * a[3] + b[2] * b[3] - inside)


def _segmentation(images, examples, scenes, source):
    classes = 1 + len(source.kinds)
    both, either = np.zeros((2, len(images), classes))
    for i, (example, found) in enumerate(zip(examples, read_scene(images, source), strict=True)):
        seen, asked = segmentation(found, source), example["segmentation"]
        agreed = np.bincount(asked[seen == asked], minlength=classes)
        both[i] = agreed
        either[i] = np.bincount(seen.ravel(), minlength=classes)
        either[i] += np.bincount(asked.ravel(), minlength=classes) - agreed

    def mean(both, either):
        return float(np.mean(both[either > 0] / either[either > 0]))

    return {"miou": ((both, either), mean)}


def segmentation(found: Sequence[Found], source: SceneSource) -> np.ndarray:
    """The classes of the pixels of a picture, int (H, W), as in a scene's entry `segmentation`."""
    side = source.image_size
    classes = np.zeros((side, side), np.int32)
    for one in found:
        left, top, width, height = one.box
        mask = stamp(source.kinds[one.kind], max(width, height)).mask
        part = classes[top : top + mask.shape[0], left : left + mask.shape[1]]
        part[mask[: part.shape[0], : part.shape[1]]] = 1 + one.kind
    return classes


def _mask(images, examples, scenes, source):
    drawn, mean, smooth, largest = [], [], [], 0
    for image, example in zip(images, examples, strict=True):
        mask, real = example["mask"][..., 0] > 0.5, example["image"]
        if not mask.any() or mask.all():
            continue
        drawn.append(_psnr(image[mask], real[mask]))
        mean.append(_psnr(real[~mask].mean(0, dtype=np.float64), real[mask]))
        smooth.append(_psnr(biharmonic(real, mask)[mask], real[mask]))
        largest = max(largest, np.abs(image[~mask].astype(int) - real[~mask]).max())
    return {
        "masked_psnr": np.array(drawn),
        "mean_colour_psnr": float(np.mean(mean)),
        "biharmonic_psnr": float(np.mean(smooth)),
        "known_error": float(largest),
    }


def biharmonic(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) whose pixels in `mask`, bool (H, W), solve Δ²u = 0 given the others: what
    inpainting can do without knowing pictures (Damelin & Hoang 2018)."""
    height, width = mask.shape
    along, across = (_second_difference(side) for side in (height, width))
    laplacian = sparse.kron(along, sparse.eye(width)) + sparse.kron(sparse.eye(height), across)
    unknown, values = mask.ravel(), image.reshape(height * width, -1).astype(np.float64)
    equations = (laplacian @ laplacian).tocsr()[unknown].tocsc()
    given = equations[:, ~unknown] @ values[~unknown]
    values[unknown] = spsolve(equations[:, unknown], -given).reshape(given.shape)
    return np.clip(np.round(values), 0, 255).astype(np.uint8).reshape(image.shape)


def _second_difference(side: int) -> sparse.spmatrix:
    """uᵢ₋₁ − 2uᵢ + uᵢ₊₁, with mirrored ends."""
    middle = np.full(side, -2.0)
    middle[[0, -1]] = -1.0
    return sparse.diags([np.ones(side - 1), middle, np.ones(side - 1)], [-1, 0, 1])


def _low_resolution(images, examples, scenes, source):
    agreement, psnr, smooth = [], [], []
    for image, example in zip(images, examples, strict=True):
        small = _eight_bits(example["low_resolution"])
        shrunk = _resized(image, small.shape[1::-1])
        agreement.append(_psnr(shrunk, small))
        psnr.append(_psnr(image, example["image"]))
        larger = bicubic(example["low_resolution"], image.shape[1::-1])
        smooth.append(_psnr(larger, example["image"]))
    return {
        "agreement": np.array(agreement),
        "drawn_psnr": np.array(psnr),
        "bicubic_psnr": float(np.mean(smooth)),
    }


def bicubic(small: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """A small picture, float (h, w, 3) in [−1, 1], enlarged to `size` (width, height), uint8."""
    return _resized(_eight_bits(small), size)


def _eight_bits(image: np.ndarray) -> np.ndarray:
    return np.clip(np.round((image + 1.0) * 127.5), 0, 255).astype(np.uint8)


def _control(images, examples, scenes, source):
    hints = [example["control"] for example in examples]
    if hints[0].shape[-1] != 1:
        return {}  # another kind of hint
    drawn = map(edges, images)
    return {"edge_correlation": np.array(list(map(_correlation, drawn, hints)))}


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 if one of them is the same everywhere."""
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt(np.sum(a * a) * np.sum(b * b))
    return float(np.sum(a * b) / size) if size > 0 else 0.0


def _resized(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(tuple(size), Image.Resampling.BICUBIC))


def _psnr(image: np.ndarray, real: np.ndarray) -> float:
    """Of 8-bit values [dB]; 60 at most, so that a mean exists."""
    error = np.mean((image.astype(np.float64) - real) ** 2) / 255.0**2
    return float(min(60.0, -10.0 * np.log10(max(error, 1e-12))))


JUDGES: dict[str, Callable[..., dict[str, Any]]] = {
    "caption": _caption,
    "label": _label,
    "boxes": _boxes,
    "segmentation": _segmentation,
    "mask": _mask,
    "low_resolution": _low_resolution,
    "control": _control,
}
