"""Trains a model: python train.py --config=configs/txt2img.py --workdir=runs/txt2img."""

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "What to train: configs/TASK.py[:variant].")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; resumed if it is there.")
flags.mark_flags_as_required(["config"])


def main(argv):
    import ldm_jax

    ldm_jax.train(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    app.run(main)
