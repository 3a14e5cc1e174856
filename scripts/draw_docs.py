"""Draws the pictures of the documentation with the bundled model.

    python -m scripts.draw_docs              # with the bundled model
    python -m scripts.draw_docs --lora=runs/lora
    python -m scripts.draw_docs --control=runs/edges
    python -m scripts.draw_docs --tasks=runs

docs/pictures: `shipped.png`, held-out scenes with their captions, in order; `edits.png`, a row for
each edit of docs/samplers.md; `drawn_by.png`, the same noise through every sampler. With a run of
configs/lora.py, `adapt.png` of docs/adapt.md, with one of configs/controlnet.py, `control.png`;
with a folder of runs named after the configs of docs/tasks.md, `tasks.png`.
"""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

import ldm_jax
from ldm_jax.data.condition_kinds import edges
from ldm_jax.data.conditions import make_conditions
from ldm_jax.data.loader import example_rng
from ldm_jax.data.sources import open_source
from ldm_jax.diffusion.editing import slerp
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.evaluation.drawing import scene_metrics
from ldm_jax.gallery import Edit
from ldm_jax.pictures import save_png, to_uint8, to_unit
from ldm_jax.runtime.compile_cache import use_compile_cache
from ldm_jax.training.batches import Prepare

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
MARGIN, GAP = 176, 4  # of a labelled sheet, in pixels
PROMPTS = (
    "a cat left of a star",
    "two red apples",
    "a rocket above a house",
    "three tulips",
    "a dog",
    "a panda and a banana",
)
SHOWN = 8  # pictures of each task
TASKS = {  # the entry that is shown, and its name
    "class2img": ("label", "a class"),
    "layout": ("boxes", "boxes"),
    "semantic": ("segmentation", "classes of pixels"),
    "inpaint": ("mask", "all but the mask"),
    "superres": ("low_resolution", "16 by 16 pixels"),
    "unconditional": ("", ""),
}
ADAPTED = (
    "a cat left of a star",
    "three tulips",
    "a rocket above a house",
    "a panda",
    "a dog below an apple",
    "two fish",
)
COLUMNS, ROWS, CELL, LINES = (
    6,
    4,
    152,
    4,
)  # of `shipped.png`; a cell's width in pixels, lines of text


def labelled(rows: dict[str, list[np.ndarray]], path: Path) -> None:
    """A sheet of uint8 pictures, a row for each label."""
    height = sum(images[0].shape[0] + GAP for images in rows.values())
    width = max(sum(image.shape[1] + GAP for image in images) for images in rows.values())
    sheet = Image.new("RGB", (MARGIN + width, height), "white")
    pen, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(13), 0
    for label, images in rows.items():
        pen.multiline_text((4, top + 18), label, "black", font)
        left = MARGIN
        for image in images:
            sheet.paste(Image.fromarray(image), (left, top))
            left += image.shape[1] + GAP
        top += images[0].shape[0] + GAP
    save_png(path, np.asarray(sheet))


def shipped(pipe: ldm_jax.Pipeline) -> None:
    """The first held-out scenes, none left out, twice as large and with their captions."""
    source = open_source(ConfigDict(pipe.config["data"] | {"image_size": 64}), "held_out")
    captions = [source.describe(i)["caption"] for i in range(COLUMNS * ROWS)]
    font, side = ImageFont.load_default(11), 128
    height = side + 4 + 14 * LINES
    sheet = Image.new("RGB", (COLUMNS * CELL, ROWS * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(to_uint8(pipe(captions, seed=0))):
        left, top = i % COLUMNS * CELL, i // COLUMNS * height
        large = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(large, (left + (CELL - side) // 2, top))
        text = textwrap.fill(captions[i], 25, max_lines=LINES)
        pen.multiline_text((left + 12, top + side + 2), text, "black", font, spacing=1)
    save_png(PICTURES / "shipped.png", np.asarray(sheet))


def edits(pipe: ldm_jax.Pipeline) -> None:
    scene = to_uint8(pipe("a cat left of a star", seed=0))[0]
    half = np.zeros((64, 64), bool)
    half[:, 32:] = True
    wide = np.pad(scene, ((0, 0), (32, 32), (0, 0)), mode="edge")
    beside = np.ones((64, 128), bool)
    beside[:, 32:96] = False
    path = "scene.png"
    save_png(path, scene)
    inverted, _ = Edit(path, source="a cat left of a star").arguments(pipe, 50)
    Path(path).unlink()
    ends = [pipe.noise(seed)[0] for seed in (4, 5)]
    between = slerp(*ends, np.linspace(0.0, 1.0, 7))
    hidden = np.where(half[..., None], np.uint8(200), scene)
    others = ("star", "rocket", "red apple", "banana", "house")

    def to_bytes(images):
        return list(to_uint8(images))

    rows = {
        "image to image,\nstrength 0.3 … 0.9": [
            scene,
            *(
                to_bytes(pipe("a dog left of a star", image=scene, strength=s))[0]
                for s in (0.3, 0.5, 0.6, 0.7, 0.9)
            ),
        ],
        "inpainting,\nfive prompts": [
            hidden,
            *to_bytes(pipe([f"a cat left of a {o}" for o in others], image=scene, mask=half)),
        ],
        "outpainting": [
            scene,
            *to_bytes(pipe("a cat left of a star", image=wide, mask=beside, n=2, tile=64)),
        ],
        "inversion, then\nanother prompt": [
            scene,
            *(
                to_bytes(pipe(p, **inverted, guidance=1.0))[0]
                for p in (f"a {o} left of a star" for o in ("cat", "dog", "panda", "tiger"))
            ),
        ],
        "from one seed's noise to\nthe next, no prompt": to_bytes(
            pipe("", n=7, latents=between, guidance=1.0)
        ),
        "larger than trained,\nin tiles": to_bytes(
            pipe(["a cat", "two red apples"], width=192, tile=64)
        ),
    }
    labelled(rows, PICTURES / "edits.png")


def drawn_by(pipe: ldm_jax.Pipeline) -> None:
    rows = {}
    for name, sampler in SAMPLERS.items():
        if sampler.spans:  # of MeanFlow models
            continue
        steps = 20 // sampler.evaluations
        rows[f"{name}\n{steps} steps"] = list(
            to_uint8(pipe(PROMPTS, sampler=name, steps=steps, seed=1))
        )
    labelled(rows, PICTURES / "drawn_by.png")


def adapted(pipe: ldm_jax.Pipeline, workdir: str) -> None:
    lora = Path(workdir) / "lora.safetensors"
    pipes = {
        "the bundled model": pipe,
        "--lora=runs/lora:0.5": pipe.with_lora(lora, scale=0.5),
        "--lora=runs/lora": pipe.with_lora(lora),
    }
    rows = {name: list(to_uint8(each(ADAPTED, steps=30, seed=1))) for name, each in pipes.items()}
    labelled(rows, PICTURES / "adapt.png")


def controlled(pipe: ldm_jax.Pipeline, workdir: str) -> None:
    """Edges of the first held-out scenes, and what the captions give without and with them."""
    data = ldm_jax.load(workdir).config["data"] | {"image_size": 64}
    source = open_source(ConfigDict(data), "held_out")
    examples = [source[i] for i in range(SHOWN)]
    captions = [example["caption"] for example in examples]
    hints = np.stack([edges(example["image"]) for example in examples])
    with_edges = pipe.with_control(workdir)(captions, conditions={"control": hints}, seed=0)
    rows = {
        "the hint": list(to_uint8(np.repeat(hints, 3, axis=-1))),
        "the caption alone": list(to_uint8(pipe(captions, seed=0))),
        "--control=runs/edges:\nedges.png": list(to_uint8(with_edges)),
    }
    sheet = {label: list(map(enlarged, row)) for label, row in rows.items()}
    labelled(sheet, PICTURES / "control.png")


def shown(entry: str, example: dict[str, Any], classes: Sequence[str]) -> np.ndarray:
    """A picture, uint8 (64, 64, 3), of what a model is told."""
    image, canvas = example["image"], Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(canvas)
    if entry == "mask":
        return np.where(example["mask"] > 0, np.uint8(128), image)
    if entry == "low_resolution":
        small = Image.fromarray(to_uint8(to_unit(example["low_resolution"])))
        return np.asarray(small.resize((64, 64), Image.Resampling.NEAREST))
    if entry == "segmentation":
        return colours(example["segmentation"])
    if entry == "label":
        lines = textwrap.fill(classes[example["label"]], 10)
        pen.multiline_text((4, 20), lines, "black", ImageFont.load_default(11))
    if entry == "boxes":
        for category, box in zip(example["categories"], example["boxes"], strict=True):
            left, top, width, height = box
            colour = tuple(int(v) for v in colours(np.array([[category + 1]]))[0, 0])
            pen.rectangle((left, top, left + width - 1, top + height - 1), outline=colour, width=2)
            name = textwrap.fill(classes[category], 6, max_lines=2)
            pen.multiline_text((left + 3, top + 3), name, colour, ImageFont.load_default(8))
    return np.asarray(canvas)


def enlarged(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((96, 96), Image.Resampling.BICUBIC))


def colours(labels: np.ndarray) -> np.ndarray:
    """A colour for each class, uint8 (H, W, 3); white for class 0."""
    hues = np.stack([labels * 67 % 200, labels * 131 % 200, labels * 29 % 200], axis=-1)
    return np.where(labels[..., None] == 0, 255, hues).astype(np.uint8)


def tasks(runs: str) -> None:
    """For each task with a run, what the model is told of the first held-out scenes, above what it
    draws."""
    rows = {}
    there = {name: told for name, told in TASKS.items() if (Path(runs) / name).is_dir()}
    for name, (entry, told) in there.items():
        pipe = ldm_jax.load(Path(runs) / name)
        data = pipe.config["data"]
        source = open_source(ConfigDict(data | {"image_size": 64}), "held_out")
        if not entry:
            rows[name] = list(to_uint8(pipe(n=SHOWN, seed=0)))
            continue
        conditions = make_conditions(data["conditions"])
        prepare = Prepare((), conditions)
        examples = [prepare(source[i], example_rng(0, i)) for i in range(SHOWN)]
        if entry == "boxes":  # in pixels, not as tokens
            examples = [source[i] for i in range(SHOWN)]
        rows[f"{name}:\n{told}"] = [shown(entry, e, source.classes) for e in examples]
        drawn = scene_metrics(pipe, source, SHOWN, conditions, batch_size=SHOWN)
        rows[name] = list(drawn.images)
    sheet = {label: list(map(enlarged, row)) for label, row in rows.items()}
    labelled(sheet, PICTURES / "tasks.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--lora")
    parser.add_argument("--control")
    parser.add_argument("--tasks")
    asked = parser.parse_args()
    use_compile_cache()
    if asked.tasks:
        tasks(asked.tasks)
    elif asked.lora:
        adapted(ldm_jax.load(), asked.lora)
    elif asked.control:
        controlled(ldm_jax.load(), asked.control)
    else:
        pipeline = ldm_jax.load()
        for draw in (shipped, edits, drawn_by):
            draw(pipeline)
