"""Draws the prompts of a benchmark into the folder that its own code measures.

    python -m ldm_jax.draw_benchmark --benchmark=geneval --model=runs/mine \\
        --prompts=geneval/prompts/evaluation_metadata.jsonl --out=out/geneval

`ldm_jax.evaluation.suites` has the benchmarks, their prompts and folders. A run that was stopped
goes on where it was; --count=4 draws the first prompts, as a try, and a run without it the rest.
"""

import os

from absl import flags

from ldm_jax.evaluation.suites import SUITES, draw_suite
from ldm_jax.gallery import load_drawing
from ldm_jax.runtime.compile_cache import use_compile_cache
from ldm_jax.runtime.console import run

BENCHMARK = flags.DEFINE_enum("benchmark", None, list(SUITES), "Whose prompts and folder.")
PROMPTS = flags.DEFINE_string("prompts", None, "File or folder of its prompts.")
MODEL = flags.DEFINE_string("model", "", "A workdir, model file or folder; empty: the bundled one.")
OUT = flags.DEFINE_string("out", None, "The folder for the pictures.")
COUNT = flags.DEFINE_integer("count", None, "Only so many prompts (hpsv2: of each style).")
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale; the model's own by default.")
STEPS = flags.DEFINE_integer("steps", None, "Steps of the sampler; the model's own by default.")
SAMPLER = flags.DEFINE_string("sampler", None, "The model's own by default.")
SEED = flags.DEFINE_integer("seed", 0, "Of the pictures.")
BATCH = flags.DEFINE_integer("batch", 16, "Pictures drawn at a time.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the parameters.")
flags.mark_flags_as_required(["benchmark", "prompts", "out"])


def main():
    use_compile_cache()
    model = os.path.expanduser(MODEL.value)
    then = draw_suite(
        load_drawing(model, DTYPE.value),
        BENCHMARK.value,
        PROMPTS.value,
        OUT.value,
        count=COUNT.value,
        guidance=GUIDANCE.value,
        steps=STEPS.value,
        sampler=SAMPLER.value,
        seed=SEED.value,
        batch=BATCH.value,
        model=model,
    )
    print(f"Pictures: {OUT.value}\nTo measure them, in the benchmark's own checkout: {then}")


if __name__ == "__main__":
    run(main)
