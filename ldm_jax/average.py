"""Makes a model of averaged parameters, of any width, from a finished or stopped run:

    python -m ldm_jax.average WORKDIR --sigma_rel=0.07 --out=model.safetensors

The run must have tracked power-function averages: --config.train.ema_sigma_rel="(0.05, 0.1)". The
width is a part of the training's length: 0.07 averages about the last 7 % of it (Karras et al.
2024, arXiv 2312.02696, §3). Try several, and keep the one with the best pictures.
"""

from pathlib import Path

from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.interop.native import exported_file, save_model
from ldm_jax.interop.opening import open_any
from ldm_jax.runtime.console import run
from ldm_jax.training.snapshots import reconstruct

SIGMA_REL = flags.DEFINE_float("sigma_rel", 0.07, "Width of the average, between 0 and 0.2887.")
OUT = flags.DEFINE_string("out", "model.safetensors", "The file to write.")
STEP = flags.DEFINE_integer("step", None, "The average at this step; the last snapshot's if unset.")


def average(workdir: str | Path, sigma_rel: float, out: str | Path, step: int | None = None) -> int:
    """Writes the run's model with parameters averaged by width `sigma_rel`; returns the step.

    What does not train, the config, and an autoencoder's `scale_factor` are those of the run's
    `model.safetensors`.

    Raises:
      FileNotFoundError: the run has not exported its model.
      ValueError: see `snapshots.reconstruct`.
    """
    workdir = Path(workdir).expanduser()
    step, averaged = reconstruct(workdir, sigma_rel, step)
    model = open_any(exported_file(workdir))
    params = flatten_dict(model.params, sep="/", keep_empty_nodes=True) | averaged
    save_model(Path(out).expanduser(), model.config, unflatten_dict(params, sep="/"))
    return step


def main(workdir: str):
    step = average(workdir, SIGMA_REL.value, OUT.value, STEP.value)
    print(f"Written: {OUT.value}, sigma_rel {SIGMA_REL.value:g} at step {step}")


if __name__ == "__main__":
    run(main, ("WORKDIR",))
