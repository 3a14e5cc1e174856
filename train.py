"""Trains a model: python train.py --config=configs/txt2img.py --workdir=runs/txt2img."""

from absl import flags
from ml_collections import config_flags

from ldm_jax.runtime.compile_cache import use_compile_cache
from ldm_jax.runtime.console import config_file, leave, run
from ldm_jax.runtime.processes import WAIT, join, part

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/TASK.py[:variant].")
WORKDIR = flags.DEFINE_string("workdir", "", "The run's directory, to resume in; empty: runs/TASK.")
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Open and summarise the data, draw first_batch.png, and stop before training."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where no cluster names it; docs/pod.md."
)
PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0.")
PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes; 1: this one alone.")
WAIT_FOR = flags.DEFINE_float("wait", WAIT, "Seconds that processes wait for each other to start.")
flags.mark_flags_as_required(["config"])


def main():
    use_compile_cache()
    path, variant = config_file(flags.FLAGS["config"])
    name = path.rsplit("/", 1)[-1].removesuffix(".py")
    workdir = WORKDIR.value or f"runs/{'-'.join(part for part in (name, variant) if part)}"
    join(COORDINATOR.value, PROCESS.value, PROCESSES.value, WAIT_FOR.value)
    # Imported here, so that a mistyped flag fails at once.
    from ldm_jax.drawn_evaluators import DRAWN
    from ldm_jax.training.loop import Interrupted, train

    try:
        train(CONFIG.value, workdir, dry_run=DRY_RUN.value, drawn=DRAWN)
    except Interrupted:  # its message has been logged
        part()
        leave()
    part()


if __name__ == "__main__":
    run(main)
