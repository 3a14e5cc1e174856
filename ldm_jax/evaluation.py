"""Metrics of a model: the library call behind `evaluate.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from ldm_jax.conditions.kinds import SIZES
from ldm_jax.data.conditions import Condition, check_conditions, make_conditions
from ldm_jax.data.loader import example_rng
from ldm_jax.data.scenes import SceneSource
from ldm_jax.data.sources import WITH_PATH, Source, open_source, sample
from ldm_jax.interop.opening import open_any
from ldm_jax.loading import load
from ldm_jax.metrics.distance import floor, frechet_distance, kernel_distance
from ldm_jax.metrics.extractors import load_extractor
from ldm_jax.metrics.novelty import novelty
from ldm_jax.metrics.reconstruction import reconstruction_quality
from ldm_jax.metrics.retrieval import caption_retrieval
from ldm_jax.metrics.scene_tasks import judge
from ldm_jax.models.build import make_autoencoder
from ldm_jax.pictures import to_signed, to_uint8, to_unit
from ldm_jax.pipeline import Pipeline
from ldm_jax.training.batches import Prepare


def evaluate(
    model: str | Path = "",
    source: str = "",
    path: str = "",
    count: int = 512,
    guidance: float | None = None,
    steps: int = 50,
    seed: int = 0,
) -> tuple[dict[str, float], np.ndarray | None]:
    """Metrics of a model file or workdir ("": the bundled model).

    `psnr` and `ssim` of the autoencoder on held-out pictures of the source. For a model with a UNet
    also metrics of `count` pictures that it draws (0: none), and these pictures, uint8 (count, H,
    W, 3): `scene_metrics` if the source is "scenes" and the model is told anything, else
    `drawn_metrics`.

    Args:
      source: what to compare with; "": the kind of data that the model was trained on.
      path: of that source; see `open_source`.
      count, guidance, steps, seed: of the drawing.
    """
    opened = open_any(model)
    config, params = opened.config, opened.params
    autoencoder = make_autoencoder(config["autoencoder"])
    size = config.get("image_size", autoencoder.resolution)
    own = config.get("data", {"source": "emoji"})
    chosen = own if source in ("", own["source"]) else {"source": source}
    if chosen["source"] in WITH_PATH and not path:
        raise ValueError(
            f"the pictures to compare with are of source {chosen['source']!r}: name them with "
            "--path, or choose --source=emoji or scenes"
        )
    data = ml_collections.ConfigDict(chosen | dict(path=path, image_size=size))

    @jax.jit
    def reconstruct(images):
        decoded = autoencoder.apply({"params": params["autoencoder"]}, to_signed(images))
        return to_unit(decoded)

    held_out = open_source(data, "held_out")
    metrics = reconstruction_quality(reconstruct, held_out)
    if config["task"] != "diffusion" or not count:
        return metrics, None
    pipe, asked = load(model), dict(guidance=guidance, steps=steps, seed=seed)
    if isinstance(held_out, SceneSource) and _needed(pipe):
        conditions = make_conditions(data.get("conditions", {}))
        drawn, images = scene_metrics(pipe, held_out, count, conditions, **asked)
    else:
        training = open_source(data, "train")
        drawn, images = drawn_metrics(pipe, training, count, held_out, **asked)
    return metrics | drawn, images


def scene_metrics(
    pipe: Pipeline,
    source: SceneSource,
    count: int,
    conditions: Sequence[Condition] = (),
    **asked: Any,
) -> tuple[dict[str, float], np.ndarray]:
    """Draws the first `count` scenes of `source` from what the model is told of them, and judges
    the pictures by `ldm_jax.metrics.scene_tasks`.

    Returns the metrics; the same of the scenes themselves, `real_…`, which is what the judge can
    reach; and the pictures, uint8 (count, H, W, 3). `conditions` make the entries that the model
    needs and a scene has not; `asked` is as in `drawn_metrics`.

    Raises:
      ValueError: the source has fewer scenes, or nothing makes an entry.
    """
    if count > len(source):
        raise ValueError(f"count={count}: there are {len(source)} held-out scenes")
    needed = _needed(pipe)
    check_conditions(conditions, {e.name: e.needs for e in pipe.model.embedders}, "scenes")
    prepare = Prepare((), conditions)
    examples = [prepare(source[i], example_rng(0, i)) for i in range(count)]
    pictures = _draw(pipe, source, examples, **asked)
    real = np.stack([example["image"] for example in examples])
    scenes = [source.scene(i) for i in range(count)]
    metrics = judge(pictures, needed, examples, scenes, source)
    best = judge(real, needed, examples, scenes, source)
    return metrics | {f"real_{name}": value for name, value in best.items()}, pictures


def drawn_metrics(
    pipe: Pipeline,
    source: Source,
    count: int,
    held_out: Source = (),
    **asked: Any,
) -> tuple[dict[str, float], np.ndarray]:
    """Draws one picture for the caption or label of each of `count` examples, evenly spaced in the
    training `source`, or `count` pictures of an unconditional model. `asked`: the guidance, steps
    and seed of the pictures, and `batch_size`.

    Returns metrics and the pictures, uint8 (count, H, W, 3). The metrics use EfficientNet-Lite0
    features: FD and KID of the drawn pictures against all of `source`; `fd_floor`, the FD between
    two halves of `source`; for captions, retrieval (`ldm_jax.metrics.retrieval`); and, with
    pictures that are `held_out`, whether the drawn ones are new (`ldm_jax.metrics.novelty`).

    Raises:
      ValueError: the model has other conditions, or none of the source's classes.
    """
    needed = _needed(pipe)
    others = sorted(needed - {"caption", "label"})
    if others:
        raise ValueError(
            f"pictures are drawn from captions, labels or nothing, and this model needs {others[0]}"
            " too: measure its autoencoder alone, --count=0"
        )
    extract = load_extractor()  # first: it may be missing, and drawing takes minutes
    source, fresh = sample(source), [held_out[i]["image"] for i in range(len(held_out))]
    chosen = np.linspace(0, len(source) - 1, count).round().astype(int)
    examples = [source[i] for i in chosen]
    pictures = _draw(pipe, source, examples, **asked)

    training = [source[i] for i in range(len(source))]
    real = extract(np.stack([example["image"] for example in training]) / 255.0)
    fake = extract(pictures / 255.0)
    metrics = {}
    if "caption" in needed:
        metrics = caption_retrieval(
            fake,
            real,
            [example["name"] for example in training],
            [example["label"] for example in training],
            [example["name"] for example in examples],
            [example["label"] for example in examples],
        )
    metrics |= {
        "fd": frechet_distance(fake, real),
        "fd_floor": floor(real),
        "kid": kernel_distance(fake, real),
    }
    if fresh:
        metrics |= novelty(fake, extract(np.stack(fresh) / 255.0), real)
    return {name: float(value) for name, value in metrics.items()}, pictures


def _needed(pipe: Pipeline) -> set[str]:
    """The entries of an example that the model is told, but for sizes, which have defaults."""
    needed = {entry for embedder in pipe.model.embedders for entry in embedder.needs}
    return needed - SIZES.keys()


def _draw(
    pipe: Pipeline,
    source: Source,
    examples: list[dict[str, Any]],
    guidance: float | None = None,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 64,
) -> np.ndarray:
    """One picture for each example, uint8 (N, H, W, 3)."""
    needed, images = _needed(pipe), []
    for start in tqdm(range(0, len(examples), batch_size), unit="batch", dynamic_ncols=True):
        batch = examples[start : start + batch_size]
        batch += batch[-1:] * (batch_size - len(batch))
        asked = {}
        if "caption" in needed:
            asked["prompt"] = [example["caption"] for example in batch]
        if "label" in needed:
            names = source.classes if pipe.classes else range(len(source.classes))
            asked["labels"] = [names[example["label"]] for example in batch]
        arrays = {
            entry: np.stack([example[entry] for example in batch])
            for entry in sorted(needed - {"caption", "label"})
        }
        if "mask" in arrays:
            asked |= {"image": arrays.pop("image"), "mask": arrays.pop("mask")[..., 0]}
        asked |= {"conditions": arrays} if arrays else {}
        asked |= {} if asked.keys() & {"prompt", "labels"} else {"n": batch_size}
        images.append(pipe(**asked, guidance=guidance, steps=steps, seed=seed + start))
    return to_uint8(np.concatenate(images)[: len(examples)])
