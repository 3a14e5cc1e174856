"""Reconstruction quality of an autoencoder."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ldm_jax.data.loader import batches_once
from ldm_jax.data.sources import Source
from ldm_jax.metrics.extractors import Extractor
from ldm_jax.metrics.image import ms_ssim, psnr, ssim
from ldm_jax.metrics.moments import frechet_of_moments, moments_of
from ldm_jax.models.lpips import lpips
from ldm_jax.models.vq import VQModel
from ldm_jax.pictures import to_signed, to_uint8


def codebook_entries(autoencoder: Any, params: Any) -> Callable[[np.ndarray], jax.Array] | None:
    """Maps uint8 pictures (B, H, W, 3) to the entries (B, h, w) of the codebook of a `VQModel` that
    they use; None for another autoencoder."""
    if not isinstance(autoencoder, VQModel):
        return None

    @jax.jit
    def entries(images):
        latents = autoencoder.apply({"params": params}, to_signed(images), method="prequant")
        return autoencoder.apply({"params": params}, latents, method="nearest").indices

    return entries


def reconstruction_quality(
    reconstruct: Callable[[np.ndarray], jax.Array],
    source: Source,
    perceptual: dict[str, Any] | None = None,
    extract: Extractor | None = None,
    entries: Callable[[np.ndarray], jax.Array] | None = None,
) -> dict[str, float]:
    """How near the reconstructions of the pictures of `source` are to them.

    `psnr` [dB], `ssim`, `ms_ssim` and, with parameters of LPIPS, `lpips`: each the mean over the
    pictures. With an extractor `rfd`, the Fréchet distance of the features of all pictures to those
    of all reconstructions. With `entries` (`codebook_entries`) `codebook_used`, the number of
    entries that the pictures use together.

    `reconstruct` maps uint8 (32, H, W, 3) to float [0, 1], which is first rounded to 8 bits, as in
    a file.
    """
    measures = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}
    if perceptual is not None:
        measures["lpips"] = lambda x, y: lpips(perceptual, to_signed(x * 255), to_signed(y * 255))
    compiled = jax.jit(lambda x, y: {name: of(x, y) for name, of in measures.items()})
    scores: dict[str, list[np.ndarray]] = {name: [] for name in measures}
    features: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    used: set[int] = set()
    for batch in batches_once(source, 32):
        drawn, valid = to_uint8(reconstruct(batch["image"])), batch["valid"]
        found = compiled(np.float32(batch["image"] / 255.0), np.float32(drawn / 255.0))
        for name, values in found.items():
            scores[name].append(np.asarray(values)[valid])
        if entries is not None:
            used.update(np.asarray(entries(batch["image"]))[valid].ravel().tolist())
        if extract is not None:
            for kept, images in zip(features, (batch["image"], drawn), strict=True):
                kept.append(extract(images[valid]))
    metrics = {name: float(np.mean(np.concatenate(values))) for name, values in scores.items()}
    if extract is not None:
        metrics["rfd"] = frechet_of_moments(*map(moments_of, features))
    if entries is not None:
        metrics["codebook_used"] = float(len(used))
    return metrics
