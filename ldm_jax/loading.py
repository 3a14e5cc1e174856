"""`load(path)`: a `Pipeline` or a `FirstStage` from any model file or folder."""

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
    """The model in a file or folder, of any supported layout; "" is the bundled model.

    The layouts are a finished run's workdir, our single file, a diffusers folder, and a `.ckpt` or
    `.safetensors` of CompVis' or Stability's code; they are recognised from the content.
    docs/models.md lists the models. An autoencoder alone becomes a `FirstStage`.

    Args:
      dtype: "bfloat16" halves the memory of the parameters; the networks also compute in it.
      autoencoder: a file or folder with an autoencoder of the same latents to use in place of the
        model's own: a better decoder, a tiny one, or the one that the file lacks.
      text: a file or folder with text encoders of the same width to use in place of the model's.
      config: the training YAML of an unpublished model of CompVis' or Stability's code. It gives
        what the tensors do not determine: heads, noise and scale.
      new_attention_order: whether a file of that code has q, k and v before the heads
        (`use_new_attention_order`), if there is no YAML.
      ema: which weights of such a file to use: the averaged (True), the trained (False), or those
        that it has, the trained first ("auto").

    Raises:
      FileNotFoundError: there is no such path.
      ValueError: the path holds no model, or a damaged one; or an argument does not fit it.
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
