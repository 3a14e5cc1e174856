"""Trains a model: python train.py --config=configs/txt2img.py --workdir=runs/txt2img."""

from absl import flags
from ml_collections import config_flags

from ldm_jax.runtime.compile_cache import use_compile_cache
from ldm_jax.runtime.console import config_file, leave, run

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/TASK.py[:variant].")
WORKDIR = flags.DEFINE_string("workdir", "", "The run's directory, to resume in; empty: runs/TASK.")
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Open and summarise the data, draw first_batch.png, and stop before training."
)
flags.mark_flags_as_required(["config"])


def main():
    use_compile_cache()
    path, variant = config_file(flags.FLAGS["config"])
    name = path.rsplit("/", 1)[-1].removesuffix(".py")
    workdir = WORKDIR.value or f"runs/{'-'.join(part for part in (name, variant) if part)}"
    # Imported here, so that a mistyped flag fails at once.
    from ldm_jax.training.loop import Interrupted, train

    try:
        train(CONFIG.value, workdir, dry_run=DRY_RUN.value)
    except Interrupted:  # its message has been logged
        leave()


if __name__ == "__main__":
    run(main)
