"""Reconstruction quality of an autoencoder."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ldm_jax.data.loader import batches_once
from ldm_jax.data.sources import Source
from ldm_jax.metrics.image import psnr, ssim
from ldm_jax.pictures import to_uint8


def reconstruction_quality(
    reconstruct: Callable[[np.ndarray], jax.Array], source: Source
) -> dict[str, Any]:
    """{"psnr" [dB], "ssim"}: each the mean over the pictures of `source`.

    `reconstruct` maps uint8 (32, H, W, 3) to float [0, 1], which is first rounded to 8 bits, as in
    a file.
    """
    scores: dict[str, list[np.ndarray]] = {"psnr": [], "ssim": []}
    for batch in batches_once(source, 32):
        x, y = batch["image"] / 255.0, to_uint8(reconstruct(batch["image"])) / 255.0
        scores["psnr"].append(np.asarray(psnr(x, y))[batch["valid"]])
        scores["ssim"].append(np.asarray(ssim(x, y))[batch["valid"]])
    return {name: float(np.mean(np.concatenate(values))) for name, values in scores.items()}
