"""Latent diffusion models in JAX: train, sample, and exchange weights."""

from ldm_jax.runtime.cpu import use_fast_cpu_kernels
from ldm_jax.version import __version__

use_fast_cpu_kernels()  # before jax starts its backends

from ldm_jax.training.loop import train  # noqa: E402

__all__ = ["__version__", "train"]
