"""Draws and edits pictures: python sample.py --prompt="a red apple" --n=8 --out=out/."""

import os

from absl import flags

from ldm_jax.conditions.weighted import SYNTAXES
from ldm_jax.data.text_files import read_text
from ldm_jax.diffusion.plan import Guidance, Sampling
from ldm_jax.diffusion.plan import flags as option_flags
from ldm_jax.gallery import Edit, draw, load_drawing
from ldm_jax.pictures import FITS
from ldm_jax.runtime.compile_cache import use_compile_cache
from ldm_jax.runtime.console import run

MODEL = flags.DEFINE_string("model", "", "A workdir, model file or folder; empty: the bundled one.")
LORA = flags.DEFINE_multi_string(
    "lora", [], "A LoRA file or workdir, with its scale after a colon; may be given several times."
)
EMBEDDING = flags.DEFINE_multi_string(
    "embedding", [], "A textual inversion, PATH or PATH:NAME; may be given several times."
)
CONTROL = flags.DEFINE_multi_string(
    "control",
    [],
    "A ControlNet or T2I-Adapter, and a picture as its hint: PATH:HINT or PATH:HINT:SCALE; may be "
    "given several times.",
)
IP_ADAPTER = flags.DEFINE_multi_string(
    "ip_adapter",
    [],
    "An IP-Adapter, and a picture as a prompt beside the text: PATH:PICTURE or PATH:PICTURE:SCALE; "
    "may be given several times.",
)
IMAGE_ENCODER = flags.DEFINE_string(
    "image_encoder",
    "",
    "CLIP's image encoder of every --ip_adapter, a file or folder; empty: image_encoder beside it.",
)
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; may be given several times.")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", "", "A text file with one prompt a line.")
SYNTAX = flags.DEFINE_enum(
    "prompt_syntax",
    "plain",
    SYNTAXES,
    "plain: a prompt is a text, cut at the model's length. a1111: it may have (word:1.2), [word], "
    "AND and BREAK, and any length.",
)
LABEL = flags.DEFINE_multi_string(
    "label", [], "Class to draw, of class-conditional models: its name or number."
)
OUT = flags.DEFINE_string("out", "out", "Directory for the PNGs, the grid and the settings.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the parameters.")
_DEFINE = {
    float: flags.DEFINE_float,
    int: flags.DEFINE_integer,
    str: flags.DEFINE_string,
    tuple: flags.DEFINE_list,
}
# Fields of Sampling and Guidance, by their flags.
OPTIONS = [
    _DEFINE[field.metadata["kind"]](name, None, field.metadata["help"])
    for cls in (Sampling, Guidance)
    for name, field in option_flags(cls).items()
]
# Arguments of Pipeline.__call__, by their own names.
SETTINGS = (
    flags.DEFINE_string("negative_prompt", None, "Prompt of the negative side of guidance."),
    flags.DEFINE_integer("n", 1, "Pictures of each prompt."),
    flags.DEFINE_integer("batch", None, "Pictures drawn at a time; default: all. Saves memory."),
    flags.DEFINE_integer("steps", None, "Steps of the sampler; default: the model's own count."),
    flags.DEFINE_integer("seed", 0, "Seed; picture i of a seed is always the same."),
    flags.DEFINE_integer("height", None, "Pixels, a multiple of the model's; default: as trained."),
    flags.DEFINE_integer("width", None, "Pixels, a multiple of the model's; default: as trained."),
    flags.DEFINE_integer("tile", None, "Pixels; draw larger pictures in tiles of this side."),
    flags.DEFINE_float("strength", None, "Of a change to --image, 0 (none) … 1."),
)
IMAGE = flags.DEFINE_string("image", "", "A picture to change.")
MASK = flags.DEFINE_string("mask", "", "A picture, white or opaque where --image is redrawn.")
OUTPAINT = flags.DEFINE_list("outpaint", [], "LEFT,TOP,RIGHT,BOTTOM pixels to add to --image.")
FIT = flags.DEFINE_enum(
    "fit",
    "crop",
    FITS,
    "How to fit an --image, and its --mask, whose sides are not multiples of the model's. crop: to "
    "the centre, at the next smaller multiples; pad: repeats the edges up to the next larger ones, "
    "and cuts the result to the size of the image; resize: to the neighbouring multiples that keep "
    "the proportions best.",
)
CONDITIONS = (
    flags.DEFINE_string("segmentation", "", "A grey picture: the class of each pixel."),
    flags.DEFINE_string("layout", "", 'JSON: [{"category_id": 0, "bbox": [x, y, w, h]}, …].'),
    flags.DEFINE_string("low_resolution", "", "A small picture to enlarge."),
    flags.DEFINE_string("hint", "", "A picture, such as edges, of a --model with a ControlNet."),
)
SOURCE = flags.DEFINE_string("source", "", "A prompt that describes --image: invert it (DDIM).")
INTERPOLATE = flags.DEFINE_integer("interpolate", 0, "Pictures between this seed and the next.")
PREVIEWS = flags.DEFINE_integer("previews", 0, "Number of steps to show in previews.png.")


def _path(flag) -> str:
    return os.path.expanduser(flag.value)


def _numbers(flag, kind) -> tuple:
    try:
        return tuple(kind(value) for value in flag.value or ())
    except ValueError:
        given, what = ",".join(flag.value), "whole numbers" if kind is int else "numbers"
        raise ValueError(f"--{flag.name}={given}: give {what} with commas between") from None


def main():
    use_compile_cache()
    prompts = list(PROMPT.value)
    if PROMPTS_FILE.value:
        lines = read_text(_path(PROMPTS_FILE)).splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"{PROMPTS_FILE.value} holds no prompt: write one a line")
    settings = {flag.name: flag.value for flag in SETTINGS} | {"labels": LABEL.value or None}
    for flag in OPTIONS:
        several = isinstance(flag.value, list)
        settings[flag.name] = _numbers(flag, float) or None if several else flag.value
    weak = os.path.expanduser(settings.pop("weak") or "")
    outpaint = _numbers(OUTPAINT, int)
    if not IMAGE.value and (MASK.value or outpaint or SOURCE.value):
        raise ValueError("--mask, --outpaint and --source change a picture: name it with --image")
    edit = Edit(_path(IMAGE), _path(MASK), outpaint, SOURCE.value, FIT.value)
    model = _path(MODEL)
    grid = draw(
        load_drawing(model, DTYPE.value),
        prompts,
        settings,
        _path(OUT),
        model=model,
        edit=edit if IMAGE.value else None,
        weak=weak,
        weak_pipe=load_drawing(weak, DTYPE.value) if weak else None,
        files={flag.name: _path(flag) for flag in CONDITIONS if flag.value},
        loras=LORA.value,
        embeddings=EMBEDDING.value,
        controls=CONTROL.value,
        ip_adapters=IP_ADAPTER.value,
        image_encoder=_path(IMAGE_ENCODER),
        prompt_syntax=SYNTAX.value,
        interpolate=INTERPOLATE.value,
        previews=PREVIEWS.value,
    )
    print("Pictures:", grid)


if __name__ == "__main__":
    run(main)
