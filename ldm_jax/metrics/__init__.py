"""Metrics of pictures: pixel by pixel (`image`), and between sets, on an extractor's features.

`load_extractor` gives EfficientNet-Lite0 features, or those of a network in a file; the other
functions accept those of any extractor.
"""

from ldm_jax.metrics.distance import floor, frechet_distance, kernel_distance
from ldm_jax.metrics.extractors import load_extractor
from ldm_jax.metrics.image import psnr, ssim
from ldm_jax.metrics.retrieval import caption_retrieval

__all__ = [
    "caption_retrieval",
    "floor",
    "frechet_distance",
    "kernel_distance",
    "load_extractor",
    "psnr",
    "ssim",
]
