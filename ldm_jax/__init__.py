"""Latent diffusion models in JAX: train, sample, and exchange weights."""

from ldm_jax.runtime.cpu import use_fast_cpu_kernels

use_fast_cpu_kernels()  # before jax starts its backends, and so before the imports below

from ldm_jax.first_stage import FirstStage  # noqa: E402
from ldm_jax.loading import load  # noqa: E402
from ldm_jax.pipeline import Pipeline  # noqa: E402
from ldm_jax.version import __version__  # noqa: E402

__all__ = ["FirstStage", "Pipeline", "__version__", "load", "train"]


def train(config, workdir, dry_run=False):
    """Trains `config` in `workdir`, or resumes there: see `ldm_jax.training.loop.train`."""
    from ldm_jax.drawn_evaluators import DRAWN  # slow imports, not needed for sampling
    from ldm_jax.training.loop import train as run

    return run(config, workdir, dry_run=dry_run, drawn=DRAWN)
