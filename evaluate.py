"""Measures a model on the data it was made for: python evaluate.py --model=runs/txt2img."""

import json

import ml_collections
from absl import flags

import ldm_jax
from ldm_jax import evaluation
from ldm_jax.data.sources import open_source
from ldm_jax.interop.native import open_model
from ldm_jax.latent_diffusion import make_autoencoder
from ldm_jax.pictures import image_grid, save_png
from ldm_jax.runtime.compile_cache import use_compile_cache
from ldm_jax.runtime.console import run

MODEL = flags.DEFINE_string("model", "", "A workdir or an exported file; empty: what ships.")
COUNT = flags.DEFINE_integer("count", 512, "Captions to draw one picture for; 0: none.")
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale; the model's own by default.")
STEPS = flags.DEFINE_integer("steps", 50, "DDIM steps.")
SEED = flags.DEFINE_integer("seed", 0, "Of the pictures.")
SOURCE = flags.DEFINE_string("source", "emoji", "Pictures to compare with: emoji, folder or tfds.")
PATH = flags.DEFINE_string("path", "", "Folder or name of that source.")
OUT = flags.DEFINE_string("out", "", "Writes metrics.json and a grid of the pictures there.")


def main():
    use_compile_cache()
    config, params = open_model(MODEL.value)
    autoencoder = make_autoencoder(config["autoencoder"])
    size = config.get("image_size", autoencoder.resolution)
    data = ml_collections.ConfigDict(dict(source=SOURCE.value, path=PATH.value, image_size=size))
    held_out = open_source(data, "held_out")
    metrics = evaluation.reconstruction(autoencoder, params["autoencoder"], held_out)
    if config["task"] == "diffusion" and COUNT.value:
        pipe = ldm_jax.load(MODEL.value)
        settings = dict(guidance=GUIDANCE.value, steps=STEPS.value, seed=SEED.value)
        drawn, images = evaluation.text_to_image(
            pipe, open_source(data, "train"), COUNT.value, **settings
        )
        metrics |= drawn
        if OUT.value:
            save_png(f"{OUT.value}/pictures.png", image_grid(images, columns=32))
    print(json.dumps(metrics, indent=2))
    if OUT.value:
        with open(f"{OUT.value}/metrics.json", "w") as file:
            json.dump(metrics, file, indent=2)


if __name__ == "__main__":
    run(main)
