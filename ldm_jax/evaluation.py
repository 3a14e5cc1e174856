"""Metrics of a model: the library call behind `evaluate.py`."""

from pathlib import Path

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from ldm_jax.conditions.kinds import SIZES
from ldm_jax.data.sources import Source, open_source, sample
from ldm_jax.interop.opening import open_any
from ldm_jax.loading import load
from ldm_jax.metrics.distance import floor, frechet_distance, kernel_distance
from ldm_jax.metrics.efficientnet import load_extractor
from ldm_jax.metrics.reconstruction import reconstruction_quality
from ldm_jax.metrics.retrieval import caption_retrieval
from ldm_jax.models.build import make_autoencoder
from ldm_jax.pictures import to_signed, to_uint8, to_unit
from ldm_jax.pipeline import Pipeline


def evaluate(
    model: str | Path = "",
    source: str = "emoji",
    path: str = "",
    count: int = 512,
    guidance: float | None = None,
    steps: int = 50,
    seed: int = 0,
) -> tuple[dict[str, float], np.ndarray | None]:
    """Metrics of a model file or workdir ("": the bundled model) on data like its training data.

    `psnr` and `ssim` of the autoencoder on held-out pictures of the source; for a model with a UNet
    also the `drawn_metrics` of `count` training examples (0: none), and their pictures, uint8
    (count, H, W, 3).
    """
    opened = open_any(model)
    config, params = opened.config, opened.params
    autoencoder = make_autoencoder(config["autoencoder"])
    size = config.get("image_size", autoencoder.resolution)
    data = ml_collections.ConfigDict(dict(source=source, path=path, image_size=size))

    @jax.jit
    def reconstruct(images):
        decoded = autoencoder.apply({"params": params["autoencoder"]}, to_signed(images))
        return to_unit(decoded)

    metrics = reconstruction_quality(reconstruct, open_source(data, "held_out"))
    if config["task"] != "diffusion" or not count:
        return metrics, None
    drawn, images = drawn_metrics(
        load(model), open_source(data, "train"), count, guidance=guidance, steps=steps, seed=seed
    )
    return metrics | drawn, images


def drawn_metrics(
    pipe: Pipeline,
    source: Source,
    count: int,
    *,
    guidance: float | None = None,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 64,
) -> tuple[dict[str, float], np.ndarray]:
    """Draws one picture for the caption or label of each of `count` examples, evenly spaced in the
    training `source`, or `count` pictures of an unconditional model.

    Returns metrics and the pictures, uint8 (count, H, W, 3). The metrics use EfficientNet-Lite0
    features: FD and KID of the drawn pictures against all of `source`; `fd_floor`, the FD between
    two halves of `source`; and, for captions, retrieval (`ldm_jax.metrics.retrieval`).

    Raises:
      ValueError: the model has other conditions, or none of the source's classes.
    """
    needed = {entry for embedder in pipe.model.embedders for entry in embedder.needs}
    others = sorted(needed - {"caption", "label"} - SIZES.keys())
    if others:
        raise ValueError(
            f"pictures are drawn from captions, labels or nothing, and this model needs {others[0]}"
            " too: measure its autoencoder alone, --count=0"
        )
    extract = load_extractor()  # first: it may be missing, and drawing takes minutes
    source = sample(source)
    chosen = np.linspace(0, len(source) - 1, count).round().astype(int)
    examples = [source[i] for i in chosen]
    images = []
    for start in tqdm(range(0, count, batch_size), unit="batch", dynamic_ncols=True):
        batch = examples[start : start + batch_size]
        batch += batch[-1:] * (batch_size - len(batch))
        asked = {}
        if "caption" in needed:
            asked["prompt"] = [example["caption"] for example in batch]
        if "label" in needed:
            names = source.classes if pipe.classes else range(len(source.classes))
            asked["labels"] = [names[example["label"]] for example in batch]
        asked |= {} if asked else {"n": batch_size}
        images.append(pipe(**asked, guidance=guidance, steps=steps, seed=seed + start))
    pictures = to_uint8(np.concatenate(images)[:count])

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
    return {name: float(value) for name, value in metrics.items()}, pictures
