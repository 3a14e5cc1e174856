"""Measures a model on data like its training data: python evaluate.py --model=runs/txt2img."""

import json
import os
from pathlib import Path

from absl import flags

from ldm_jax.evaluation import evaluate
from ldm_jax.pictures import image_grid, save_png
from ldm_jax.runtime.compile_cache import use_compile_cache
from ldm_jax.runtime.console import run

MODEL = flags.DEFINE_string("model", "", "A workdir or an exported file; empty: the bundled one.")
SOURCE = flags.DEFINE_string(
    "source",
    "",
    "Pictures to compare with: emoji, scenes, folder, shards or tfds; empty: as in training.",
)
PATH = flags.DEFINE_string("path", "", "Folder or name of that source.")
COUNT = flags.DEFINE_integer("count", 512, "Captions or labels, with one picture each; 0: none.")
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale; the model's own by default.")
STEPS = flags.DEFINE_integer("steps", 50, "DDIM steps.")
SEED = flags.DEFINE_integer("seed", 0, "Of the pictures.")
OUT = flags.DEFINE_string("out", "", "Directory for metrics.json and a grid of the pictures.")


def main():
    use_compile_cache()
    model, path = os.path.expanduser(MODEL.value), os.path.expanduser(PATH.value)
    numbers = (flag.value for flag in (COUNT, GUIDANCE, STEPS, SEED))
    metrics, images = evaluate(model, SOURCE.value, path, *numbers)
    print(json.dumps(metrics, indent=2))
    if OUT.value:
        out = Path(OUT.value).expanduser()
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        if images is not None:
            save_png(out / "pictures.png", image_grid(images, columns=32))


if __name__ == "__main__":
    run(main)
