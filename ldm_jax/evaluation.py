"""How good a model is, measured: the library call behind `evaluate.py`."""

from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ldm_jax.data.loader import batches_once
from ldm_jax.data.sources import Source
from ldm_jax.metrics.distance import floor, frechet_distance, kernel_distance
from ldm_jax.metrics.efficientnet import load_extractor
from ldm_jax.metrics.image import psnr, ssim
from ldm_jax.metrics.retrieval import caption_retrieval
from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.pictures import to_float, to_uint8
from ldm_jax.pipeline import Pipeline


def reconstruction(
    autoencoder: AutoencoderKL, params: dict[str, Any], source: Source
) -> dict[str, float]:
    """PSNR [dB] and SSIM of 8-bit reconstructions, each the mean over the pictures of `source`."""

    @jax.jit
    def reconstruct(params, images):
        return (autoencoder.apply({"params": params}, to_float(images)) + 1.0) / 2.0

    scores: dict[str, list[np.ndarray]] = {"psnr": [], "ssim": []}
    for batch in batches_once(source, 32):
        x, y = batch["image"] / 255.0, to_uint8(reconstruct(params, batch["image"])) / 255.0
        scores["psnr"].append(np.asarray(psnr(x, y))[batch["valid"]])
        scores["ssim"].append(np.asarray(ssim(x, y))[batch["valid"]])
    return {name: float(np.mean(np.concatenate(values))) for name, values in scores.items()}


def text_to_image(
    pipe: Pipeline,
    source: Source,
    count: int,
    *,
    guidance: float | None = None,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 64,
) -> tuple[dict[str, float], np.ndarray]:
    """Draws one picture for each of `count` captions, evenly spaced in the training `source`.

    Returns metrics and the pictures, uint8 (count, H, W, 3). The metrics, on EfficientNet-Lite0
    features: caption retrieval (`ldm_jax.metrics.retrieval`), FD and KID of the drawn pictures
    against all of `source`, and `fd_floor`, the FD of two halves of `source` itself.
    """
    chosen = np.linspace(0, len(source) - 1, count).round().astype(int)
    examples = [source[i] for i in chosen]
    images = []
    for start in tqdm(range(0, count, batch_size), unit="batch", dynamic_ncols=True):
        captions = [example["caption"] for example in examples[start : start + batch_size]]
        padded = captions + [""] * (batch_size - len(captions))
        drawn = pipe(padded, guidance=guidance, steps=steps, seed=seed + start)
        images.append(drawn[: len(captions)])
    images = to_uint8(np.concatenate(images))

    extract = load_extractor()
    training = [source[i] for i in range(len(source))]
    real = extract(np.stack([example["image"] for example in training]) / 255.0)
    fake = extract(images / 255.0)
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
    return {name: float(value) for name, value in metrics.items()}, images
