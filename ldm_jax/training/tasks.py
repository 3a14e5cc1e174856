"""Tasks by name: a config becomes the object that the loop drives."""

import logging
from typing import Any

import jax
from safetensors.numpy import load_file

from ldm_jax.data.sources import open_source
from ldm_jax.interop.opening import open_any
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.training.autoencoder_task import AutoencoderTask
from ldm_jax.training.diffusion_task import PICTURE_AUGMENTS, DiffusionTask, LatentSource
from ldm_jax.training.state import Task
from ldm_jax.training.workdir import config_dict

log = logging.getLogger(__name__)


def make_task(config: Any) -> Task:
    """The task `config.task` names, with its data opened.

    Raises:
      ValueError: no such task, or a setting that it cannot use.
    """
    if config.task not in TASKS:
        raise ValueError(f"task={config.task!r}: choose one of {', '.join(TASKS)}")
    return TASKS[config.task](config)


def _autoencoder(config: Any) -> AutoencoderTask:
    if not config.loss.lpips:
        log.info("loss.lpips names no file: training without the perceptual term")
    return AutoencoderTask(
        config=config,
        source=open_source(config.data, "train"),
        held_out=open_source(config.data, "held_out"),
        perceptual=load_file(config.loss.lpips) if config.loss.lpips else None,
    )


def _diffusion(config: Any) -> DiffusionTask:
    pictures = [name for name in config.data.augment if name in PICTURE_AUGMENTS]
    if pictures:
        raise ValueError(
            f"data.augment: {', '.join(pictures)} would change the pictures, but this task trains "
            "on latents that are encoded once; only captions can be augmented here"
        )
    first_stage = open_any(config.first_stage)
    resolved = config_dict(config) | {"autoencoder": first_stage.config["autoencoder"]}
    model = LatentDiffusion.from_config(resolved)
    params = jax.device_put(first_stage.params["autoencoder"])
    log.info("Encoding the pictures once with %s", config.first_stage or "the shipped weights")
    source, held_out = (
        LatentSource(open_source(config.data, split), model.autoencoder, params)
        for split in ("train", "held_out")
    )
    return DiffusionTask(config, resolved, model, params, source, held_out)


TASKS = {"autoencoder": _autoencoder, "diffusion": _diffusion}
