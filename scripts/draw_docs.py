"""Draws the pictures of the documentation with the bundled model.

    python -m scripts.draw_docs

docs/pictures: `scenes.png`, the first held-out scenes with their captions; `edits.png`, a row for
each edit of docs/samplers.md; `drawn_by.png`, the same noise through every sampler.
"""

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import ldm_jax
from ldm_jax.data.scenes import SceneSource
from ldm_jax.diffusion.editing import slerp
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.gallery import Edit
from ldm_jax.pictures import save_png, to_uint8
from ldm_jax.runtime.compile_cache import use_compile_cache

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
MARGIN, GAP = 176, 4  # of a labelled sheet, in pixels
PROMPTS = (
    "a red apple",
    "a cat left of a star",
    "three tulips",
    "a rocket above a house",
    "two pandas on a blue ground",
    "a ghost, a banana and a drum from left to right",
)


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


def scenes(pipe: ldm_jax.Pipeline, columns: int = 8, rows: int = 4) -> None:
    data = pipe.config["data"]
    source = SceneSource("held_out", pipe.config["image_size"], data["scenes"], data["held_out"])
    captions = [source.describe(i)["caption"] for i in range(columns * rows)]
    side, below, font = 2 * source.image_size, 44, ImageFont.load_default(11)
    sheet = Image.new("RGB", (columns * (side + GAP), rows * (side + below)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(to_uint8(pipe(captions))):
        left, top = i % columns * (side + GAP), i // columns * (side + below)
        sheet.paste(
            Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC), (left, top)
        )
        words = "\n".join(textwrap.wrap(captions[i], 24)[:3])
        pen.multiline_text((left + 2, top + side + 2), words, "black", font, spacing=1)
    save_png(PICTURES / "scenes.png", np.asarray(sheet))


def edits(pipe: ldm_jax.Pipeline) -> None:
    picture = to_uint8(pipe("a cat above a star on a light blue ground", seed=3))[0]
    mask = np.zeros((64, 64), bool)
    mask[32:] = True
    wide = np.pad(picture, ((0, 0), (32, 32), (0, 0)), mode="edge")
    beside = np.ones((64, 128), bool)
    beside[:, 32:96] = False
    below = [f"a cat above {noun}" for noun in ("a house", "a tulip", "a bus", "a key", "a crab")]
    path = "picture.png"
    save_png(path, picture)
    caption = "a cat above a star on a light blue ground"
    inverted, _ = Edit(path, source=caption).arguments(pipe, 50)
    Path(path).unlink()
    ends = [pipe.noise(seed)[0] for seed in (4, 5)]
    between = np.asarray(slerp(*ends, np.linspace(0.0, 1.0, 7)))
    hidden = np.where(mask[..., None], np.uint8(200), picture)

    def to_bytes(images):
        return list(to_uint8(images))

    rows = {
        "image to image,\nstrength 0.2 … 0.8": [
            picture,
            *(
                to_bytes(pipe("a dog above a red heart", image=picture, strength=s))[0]
                for s in (0.2, 0.35, 0.5, 0.65, 0.8)
            ),
        ],
        "inpainting,\nfive prompts": [hidden, *to_bytes(pipe(below, image=picture, mask=mask))],
        "outpainting": [picture, *to_bytes(pipe("tulips", image=wide, mask=beside, n=2, tile=64))],
        "inversion, then\nanother prompt": [
            picture,
            *(
                to_bytes(pipe(p, **inverted, guidance=1.0))[0]
                for p in (caption, caption.replace("cat", "dog"), caption.replace("star", "tulip"))
            ),
        ],
        "from one seed's noise to\nthe next": to_bytes(pipe("a panda", n=7, latents=between)),
        "larger than trained,\nin tiles": to_bytes(
            pipe(["four stars", "three tulips"], width=192, tile=64)
        ),
    }
    labelled(rows, PICTURES / "edits.png")


def drawn_by(pipe: ldm_jax.Pipeline) -> None:
    rows = {}
    for name in SAMPLERS:
        steps = 20 // SAMPLERS[name].evaluations
        rows[f"{name}\n{steps} steps"] = list(
            to_uint8(pipe(PROMPTS, sampler=name, steps=steps, seed=1))
        )
    labelled(rows, PICTURES / "drawn_by.png")


if __name__ == "__main__":
    use_compile_cache()
    pipeline = ldm_jax.load()
    for draw in (scenes, edits, drawn_by):
        draw(pipeline)
