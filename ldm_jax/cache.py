"""Encodes a data set once, for training without its pictures: latents, and states of captions.

    python -m ldm_jax.cache --config=configs/txt2img.py --out=DIR
    python train.py --config=configs/txt2img.py --config.latents=shards --config.cache=DIR

It stores the moments of the latents of each picture and of its mirror image, and what the text
encoders that do not train make of the captions (--config.text_states=shards). If it is stopped, the
same command goes on where it was. See docs/data.md.
"""

import time

from absl import flags
from ml_collections import config_flags

from ldm_jax.runtime.compile_cache import use_compile_cache
from ldm_jax.runtime.console import config_file, run
from ldm_jax.runtime.processes import WAIT, join, part, together

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/TASK.py[:variant].")
OUT = flags.DEFINE_string("out", None, "The folder of the cache, new or empty.", required=True)
flags.DEFINE_enum("dtype", "float32", ["float32", "float16", "bfloat16"], "Of what is stored.")
flags.DEFINE_bool("flips", True, "Also the mirror images, for data.augment='(\"flip\",)'.")
flags.DEFINE_bool("states", True, "Also the states of frozen text encoders.")
flags.DEFINE_integer("shard_size", 1024, "Number of examples in a shard.", 1)
flags.DEFINE_integer("batch_size", 32, "Pictures that a process encodes together.", 1)
COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where no cluster names it; docs/pod.md."
)
PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0.")
PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes; 1: this one alone.")
flags.mark_flags_as_required(["config"])


def main():
    use_compile_cache()
    config_file(flags.FLAGS["config"])
    join(COORDINATOR.value, PROCESS.value, PROCESSES.value, WAIT)
    # Imported here, so that a mistyped flag fails at once.
    from ldm_jax.training.caching import Options, table, write_cache

    given = {name: flags.FLAGS[name].value for name in Options.__dataclass_fields__}
    began = time.perf_counter()
    with together():
        report = write_cache(CONFIG.value, OUT.value, Options(**given))
    if report:
        print(table(report))
        print(f"Written in {time.perf_counter() - began:.1f} s; train with", end=" ")
        states = " --config.text_states=shards" if report["states"] else ""
        print(f"--config.latents=shards{states} --config.cache={OUT.value}")
    part()


if __name__ == "__main__":
    run(main)
