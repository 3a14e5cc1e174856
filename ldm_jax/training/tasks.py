"""Tasks by name: a config becomes the object that the loop drives."""

from typing import Any

from absl import logging
from safetensors.numpy import load_file

from ldm_jax.data.sources import open_source
from ldm_jax.training.autoencoder_task import AutoencoderTask
from ldm_jax.training.state import Task


def make_task(config: Any) -> Task:
    """The task `config.task` names, with its data opened.

    Raises:
      ValueError: no such task.
    """
    if config.task not in TASKS:
        raise ValueError(f"task={config.task!r}: choose one of {', '.join(TASKS)}")
    return TASKS[config.task](config)


def _autoencoder(config: Any) -> AutoencoderTask:
    if not config.loss.lpips:
        logging.info("loss.lpips names no file: training without the perceptual term")
    return AutoencoderTask(
        config=config,
        source=open_source(config.data, "train"),
        held_out=open_source(config.data, "held_out"),
        perceptual=load_file(config.loss.lpips) if config.loss.lpips else None,
    )


TASKS = {"autoencoder": _autoencoder}
