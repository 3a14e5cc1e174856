"""Makes a model of averaged parameters, of any width, from a finished or stopped run:

    python -m ldm_jax.average WORKDIR --sigma_rel=0.07 --out=model.safetensors

The run must have tracked power-function averages: --config.train.ema_sigma_rel="(0.05, 0.1)". The
width is a part of the training's length: 0.07 averages about the last 7 % of it (Karras et al.
2024, arXiv 2312.02696, §3). Try several, and keep the one with the best pictures.
"""

from absl import flags

from ldm_jax.runtime.console import run
from ldm_jax.training.snapshots import write_average

SIGMA_REL = flags.DEFINE_float("sigma_rel", 0.07, "Width of the average, between 0 and 0.2887.")
OUT = flags.DEFINE_string("out", "model.safetensors", "The file to write.")
STEP = flags.DEFINE_integer("step", None, "The average at this step; the last snapshot's if unset.")


def main(workdir: str):
    step = write_average(workdir, SIGMA_REL.value, OUT.value, STEP.value)
    print(f"Written: {OUT.value}, sigma_rel {SIGMA_REL.value:g} at step {step}")


if __name__ == "__main__":
    run(main, ("WORKDIR",))
