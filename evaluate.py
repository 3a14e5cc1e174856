"""Measures a model on data like its training data: python evaluate.py --model=runs/txt2img."""

import json
import os
from pathlib import Path

from absl import flags

from ldm_jax.diffusion.plan import Sampling
from ldm_jax.evaluation.curves import pareto_plot, settings_of, table
from ldm_jax.evaluation.run import open_evaluation
from ldm_jax.metrics.resizing import RESIZES
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
COUNT = flags.DEFINE_integer(
    "count",
    None,
    "Captions or labels, with one picture each; 0: none; unset: 512, or as many as there are.",
)
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale; the model's own by default.")
STEPS = flags.DEFINE_integer("steps", None, "Of the sampler; the model's own by default.")
SAMPLER = flags.DEFINE_string("sampler", None, "The model's own by default.")
CACHE_INTERVAL = flags.DEFINE_integer(
    "cache_interval", 1, "DeepCache: every so many steps run the whole UNet; 1: all."
)
CACHE_BRANCH = flags.DEFINE_integer(
    "cache_branch", 0, "DeepCache: the UNet's skip up to which every step runs."
)
SEED = flags.DEFINE_integer("seed", 0, "Of the pictures.")
EXTRACTOR = flags.DEFINE_string(
    "extractor",
    "",
    "File of the network that the distances use: FID's Inception-v3, DINOv2 or CLIP; empty: "
    "EfficientNet-Lite0.",
)
RESIZE = flags.DEFINE_enum("resize", "", ["", *RESIZES], "Empty: the extractor's own.")
REFERENCE = flags.DEFINE_string(
    "reference", "", "Statistics (.npz) for fd, of python -m ldm_jax.statistics or others'."
)
LPIPS = flags.DEFINE_string(
    "lpips", "", "File of LPIPS, or NETWORK,HEADS; empty: reconstructions without it."
)
CLIP = flags.DEFINE_string(
    "clip", "", "File or folder of a CLIP with both towers, for clip_score; empty: without it."
)
SWEEP = flags.DEFINE_multi_string(
    "sweep", [], "NAME=VALUES of guidance, steps or sampler: guidance=1:8, steps=10,20; repeatable."
)
OUT = flags.DEFINE_string(
    "out", "", "Directory for metrics.json, or metrics_sweep.json and pareto.png, and pictures."
)


def main():
    use_compile_cache()
    settings = settings_of(SWEEP.value)
    model, path, extractor, reference = (
        os.path.expanduser(flag.value) for flag in (MODEL, PATH, EXTRACTOR, REFERENCE)
    )
    opened = open_evaluation(
        model,
        SOURCE.value,
        path,
        COUNT.value,
        extractor,
        RESIZE.value,
        reference,
        LPIPS.value,
        CLIP.value,
    )
    sampling = Sampling(
        SAMPLER.value, cache_interval=CACHE_INTERVAL.value, cache_branch=CACHE_BRANCH.value
    )
    own = dict(guidance=GUIDANCE.value, steps=STEPS.value, seed=SEED.value, sampler=sampling)
    out = Path(OUT.value).expanduser() if OUT.value else None
    if out:
        out.mkdir(parents=True, exist_ok=True)
    if SWEEP.value:
        if CACHE_INTERVAL.value > 1 and any("sampler" in setting for setting in settings):
            raise ValueError("--cache_interval: not with a --sweep of samplers, which have none")
        if opened.pipe is None:
            raise ValueError("--sweep draws pictures: it needs a diffusion model and a --count")
        sweep(opened, settings, own, out)
        return
    metrics, images = opened.measure(**own)
    print(json.dumps(metrics, indent=2, ensure_ascii=False))
    if out:
        _write(out / "metrics.json", metrics)
        if images is not None:
            save_png(out / "pictures.png", image_grid(images, columns=32))


def sweep(opened, settings, own, out):
    """Measures each setting; what is there is written after each, so that a stop loses one."""
    results = []
    for i, setting in enumerate(settings):
        print(f"{i + 1}/{len(settings)} {setting}", flush=True)
        metrics, images = opened.measure(**own | setting)
        results.append({"setting": setting, "metrics": metrics})
        if out:
            _write(out / "metrics_sweep.json", results)
            name = "-".join(f"{k}_{v}" for k, v in setting.items())
            save_png(out / f"pictures-{name}.png", image_grid(images, columns=32))
    print(table(results))
    if out:
        try:
            save_png(out / "pareto.png", pareto_plot(results))
        except ValueError as error:  # one metric has a table and no plot
            print(f"No pareto.png: {error}")


def _write(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
