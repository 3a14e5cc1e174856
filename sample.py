"""Draws pictures: python sample.py --prompt="a red apple" --n=8 --out=out/."""

from absl import flags

import ldm_jax
from ldm_jax.gallery import draw
from ldm_jax.runtime.compile_cache import use_compile_cache
from ldm_jax.runtime.console import run

MODEL = flags.DEFINE_string("model", "", "A workdir or an exported file; empty: what ships.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; may be given several times.")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", "", "A text file with one prompt a line.")
NEGATIVE = flags.DEFINE_string("negative_prompt", "", "What to lead away from.")
N = flags.DEFINE_integer("n", 1, "Pictures of each prompt.")
STEPS = flags.DEFINE_integer("steps", 50, "Steps of the sampler.")
SAMPLER = flags.DEFINE_string("sampler", "ddim", "The sampler.")
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale; the model's own by default.")
ETA = flags.DEFINE_float("eta", 0.0, "0: deterministic; 1: as much noise as DDPM.")
SEED = flags.DEFINE_integer("seed", 0, "Picture i of a seed is always the same.")
HEIGHT = flags.DEFINE_integer("height", None, "Pixels; as trained by default.")
WIDTH = flags.DEFINE_integer("width", None, "Pixels; as trained by default.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the parameters.")
OUT = flags.DEFINE_string("out", "out", "Directory for the PNGs, the grid and the settings.")


def main():
    use_compile_cache()
    prompts = list(PROMPT.value)
    if PROMPTS_FILE.value:
        with open(PROMPTS_FILE.value, encoding="utf-8") as file:
            prompts += [line.strip() for line in file if line.strip()]
    if not prompts:
        raise ValueError("nothing to draw: give --prompt or --prompts_file")
    settings = dict(
        negative_prompt=NEGATIVE.value,
        n=N.value,
        steps=STEPS.value,
        sampler=SAMPLER.value,
        guidance=GUIDANCE.value,
        eta=ETA.value,
        seed=SEED.value,
        height=HEIGHT.value,
        width=WIDTH.value,
    )
    pipe = ldm_jax.load(MODEL.value, DTYPE.value)
    print("Pictures:", draw(pipe, prompts, settings, OUT.value, model=MODEL.value))


if __name__ == "__main__":
    run(main)
