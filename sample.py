"""Draws and edits pictures: python sample.py --prompt="a red apple" --n=8 --out=out/."""

from absl import flags

import ldm_jax
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.gallery import Edit, draw
from ldm_jax.runtime.compile_cache import use_compile_cache
from ldm_jax.runtime.console import run

MODEL = flags.DEFINE_string("model", "", "A workdir or a model file or folder; empty: what ships.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; may be given several times.")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", "", "A text file with one prompt a line.")
LABEL = flags.DEFINE_multi_integer("label", [], "Class to draw, of class-conditional models.")
OUT = flags.DEFINE_string("out", "out", "Directory for the PNGs, the grid and the settings.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the parameters.")
# Arguments of Pipeline.__call__, by their own names.
SETTINGS = (
    flags.DEFINE_string("negative_prompt", "", "What to lead away from."),
    flags.DEFINE_integer("n", 1, "Pictures of each prompt."),
    flags.DEFINE_integer("steps", 50, "Steps of the sampler."),
    flags.DEFINE_string("sampler", "ddim", f"One of {', '.join(SAMPLERS)}."),
    flags.DEFINE_string("spacing", None, "Of the steps, such as trailing or karras."),
    flags.DEFINE_float("guidance", None, "Guidance scale; the model's own by default."),
    flags.DEFINE_list("guidance_interval", None, "LOW,HIGH share of the noise with guidance."),
    flags.DEFINE_float("guidance_rescale", 0.0, "0…1, against over-exposure."),
    flags.DEFINE_float("threshold", None, "Percentile of dynamic thresholding, 0…1."),
    flags.DEFINE_list("compose", None, "A weight for each prompt: all make one picture."),
    flags.DEFINE_float("eta", None, "0: no noise; 1: as much as DDPM; default: the sampler's."),
    flags.DEFINE_float("churn", None, "Noise stirred in by euler and heun."),
    flags.DEFINE_integer("seed", 0, "Picture i of a seed is always the same."),
    flags.DEFINE_integer("height", None, "Pixels; as trained by default."),
    flags.DEFINE_integer("width", None, "Pixels; as trained by default."),
    flags.DEFINE_integer("tile", None, "Pixels; draw larger pictures in tiles of this side."),
    flags.DEFINE_float("strength", None, "Of a change to --image, 0 (none) … 1."),
)
IMAGE = flags.DEFINE_string("image", "", "A picture to change.")
MASK = flags.DEFINE_string("mask", "", "A black and white picture: where to draw --image anew.")
OUTPAINT = flags.DEFINE_list("outpaint", [], "LEFT,TOP,RIGHT,BOTTOM pixels to add to --image.")
SOURCE = flags.DEFINE_string("source", "", "A prompt for --image as it is: invert it (DDIM).")
WEAK = flags.DEFINE_string("weak", "", "A worse model to lead away from (autoguidance).")
INTERPOLATE = flags.DEFINE_integer("interpolate", 0, "Pictures between this seed and the next.")
PREVIEWS = flags.DEFINE_integer("previews", 0, "Moments of the way to show in previews.png.")


def main():
    use_compile_cache()
    prompts = list(PROMPT.value)
    if PROMPTS_FILE.value:
        with open(PROMPTS_FILE.value, encoding="utf-8") as file:
            prompts += [line.strip() for line in file if line.strip()]
    settings = {flag.name: flag.value for flag in SETTINGS} | {"labels": LABEL.value or None}
    for name in ("guidance_interval", "compose"):
        settings[name] = settings[name] and [float(value) for value in settings[name]]
    outpaint = tuple(int(value) for value in OUTPAINT.value)
    if not IMAGE.value and (MASK.value or outpaint or SOURCE.value):
        raise ValueError("--mask, --outpaint and --source change a picture: name it with --image")
    edit = Edit(IMAGE.value, MASK.value, outpaint, SOURCE.value) if IMAGE.value else None
    grid = draw(
        ldm_jax.load(MODEL.value, DTYPE.value),
        prompts,
        settings,
        OUT.value,
        model=MODEL.value,
        edit=edit,
        weak=WEAK.value,
        weak_pipe=ldm_jax.load(WEAK.value, DTYPE.value) if WEAK.value else None,
        interpolate=INTERPOLATE.value,
        previews=PREVIEWS.value,
    )
    print("Pictures:", grid)


if __name__ == "__main__":
    run(main)
