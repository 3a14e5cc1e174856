"""`load(path)`: from anybody's file to something that draws."""

from pathlib import Path

import jax

from ldm_jax.first_stage import FirstStage
from ldm_jax.interop.opening import open_any
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.build import make_autoencoder
from ldm_jax.pipeline import Pipeline


def load(
    path: str | Path = "",
    dtype: str = "float32",
    autoencoder: str | Path = "",
    *,
    text: str | Path = "",
    config: str | Path = "",
    new_attention_order: bool = False,
    ema: bool | str = "auto",
) -> Pipeline | FirstStage:
    """A model from any file or folder that holds one, whoever wrote it; "" is the bundled one.

    A finished run's workdir, a file of ours, a folder of diffusers', a `.ckpt` or `.safetensors` in
    the layout of CompVis' or Stability's code: found out by looking. docs/models.md lists models.
    An autoencoder alone becomes a `FirstStage`.

    Args:
      dtype: "bfloat16" halves the memory of the parameters and computes in it.
      autoencoder: a file or folder of one to use in place of the model's own, of the same latents:
        a better decoder, a tiny one, or the one that a file lacks.
      text: a file or folder of text encoders to use in place of the model's own, of the same width.
      config: the YAML with which a model of CompVis' or Stability's code was trained that was never
        published: it says what no tensor does, heads, noise and scale.
      new_attention_order: whether a file of that code has q, k and v before the heads
        (`use_new_attention_order`), if no YAML says it.
      ema: averaged weights of such a file (True), trained ones (False), or what it needs ("auto").

    Raises:
      FileNotFoundError: nothing there. ValueError: it holds no model, or a damaged one; or what is
        given does not fit it.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: choose float32 or bfloat16")
    parts = dict(autoencoder=autoencoder, text=text)
    options = dict(config=config, new_attention_order=new_attention_order)
    opened = open_any(path, dtype, ema, **parts, **options)
    found, params = opened.config, jax.device_put(opened.params)
    if found["task"] == "autoencoder":
        return FirstStage(make_autoencoder(found["autoencoder"], dtype), params, found)
    return Pipeline(LatentDiffusion.from_config(found, dtype), params, found)
