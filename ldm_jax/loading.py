"""`load(path)`: from anybody's file to something that draws."""

from pathlib import Path

import jax

from ldm_jax.first_stage import FirstStage
from ldm_jax.interop.opening import open_any
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.build import make_autoencoder
from ldm_jax.pipeline import Pipeline


def load(
    path: str | Path = "", dtype: str = "float32", autoencoder: str | Path = ""
) -> Pipeline | FirstStage:
    """A model from any file or folder that holds one, whoever wrote it; "" is the one that ships.

    A finished run's workdir, a file of ours, a folder of diffusers', a `.ckpt` or `.safetensors` in
    the layout of CompVis' or Stability's code: found out by looking. docs/models.md lists models.
    An autoencoder alone becomes a `FirstStage`.

    Args:
      dtype: "bfloat16" halves the memory of the parameters and computes in it.
      autoencoder: a file or folder of one to use in place of the model's own, of the same latents:
        a better decoder, or a tiny one.

    Raises:
      FileNotFoundError: nothing there. ValueError: it holds no model, or a damaged one.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: choose float32 or bfloat16")
    opened = open_any(path, dtype)
    config, params = opened.config, opened.params
    if autoencoder:
        other = open_any(autoencoder, dtype)
        config, params = _replaced(config, params, other.config, other.params, autoencoder)
    params = jax.device_put(params)
    if config["task"] == "autoencoder":
        return FirstStage(make_autoencoder(config["autoencoder"], dtype), params, config)
    return Pipeline(LatentDiffusion.from_config(config, dtype), params, config)


def _replaced(config, params, other_config, other_params, path):
    """A model with another's autoencoder; the scale of the latents stays."""
    mine, its = config["autoencoder"], other_config["autoencoder"]
    channels, others = (make_autoencoder(section).embed_dim for section in (mine, its))
    if channels != others:
        raise ValueError(
            f"autoencoder={path} has latents of {others} channels, the model of {channels}"
        )
    if its.get("kind") != "tiny" and "scale_factor" in mine:
        its = its | {"scale_factor": mine["scale_factor"]}
    params = params | {"autoencoder": other_params["autoencoder"]}
    return config | {"autoencoder": its}, params
