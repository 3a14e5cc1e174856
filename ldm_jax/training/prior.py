"""Prior preservation: a model also trains on pictures that it drew itself (Ruiz et al. 2023, §3.3).

So a model that learns "a photo of sks dog" from few pictures still draws other dogs. In place of
the paper's two losses, half of the examples are its own pictures, which is a weight of 1.
"""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax

from ldm_jax.data.folder import FolderSource
from ldm_jax.data.mixture import Mixture
from ldm_jax.data.sources import Source
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pictures import save_png, to_uint8
from ldm_jax.pipeline import Pipeline

log = logging.getLogger(__name__)
BATCH = 8  # pictures drawn at a time


def with_prior(
    source: Source,
    config: Any,
    model: LatentDiffusion,
    params: dict[str, Any],
    described: dict[str, Any],
    folder: Path | None,
) -> Source:
    """The source, in turn with pictures that the model draws of `prior.prompt`, if there is one.

    They are drawn once, into `folder`; a later start reads them. None: a temporary folder.

    Args:
      params: of the whole model before training.
      described: its config, as `Pipeline` takes it.

    Raises ValueError for settings with which this does not work.
    """
    prior = config.get("prior")
    if not prior or not prior.prompt:
        return source
    if not config.init_from:
        raise ValueError("prior.prompt is drawn by a trained model: name it with init_from=PATH")
    if not any("caption" in embedder.needs for embedder in model.embedders):
        raise ValueError("prior.prompt is for models that are told a caption; this one is not")
    if config.data.get("buckets"):
        raise ValueError("prior.prompt gives squares: set data.buckets to False")
    if jax.process_count() > 1:
        raise ValueError("prior.prompt is drawn by one process: start on one, then on all")
    if prior.count < 1:
        raise ValueError(f"prior.count={prior.count}: choose 1 or more pictures")
    folder = Path(tempfile.mkdtemp()) if folder is None else folder
    if not folder.is_dir():
        _draw(prior, Pipeline(model, jax.device_put(params), described), config.seed, folder)
    if (there := len(list(folder.glob("*.png")))) != prior.count:
        raise ValueError(
            f"{folder} holds {there} pictures, and prior.count={prior.count}: remove the folder, "
            "and they are drawn anew"
        )
    return Mixture((source, FolderSource(folder, "all", config.data.image_size)))


def _draw(prior: Any, pipe: Pipeline, seed: int, folder: Path) -> None:
    """Draws the pictures and their captions; the folder appears when it is whole."""
    log.info("Drawing %d pictures of %r into %s", prior.count, prior.prompt, folder)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    images = pipe(prior.prompt, n=prior.count, seed=seed, batch=min(BATCH, prior.count))
    for i, image in enumerate(to_uint8(images)):
        save_png(part / f"{i:04d}.png", image[..., :3])
        (part / f"{i:04d}.txt").write_text(prior.prompt + "\n", encoding="utf-8")
    part.rename(folder)
