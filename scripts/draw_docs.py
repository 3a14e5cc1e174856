"""Draws the pictures of the documentation with the bundled model.

    python -m scripts.draw_docs

docs/pictures: `shipped.png`, evenly spaced training captions; `edits.png`, a row for each edit of
docs/samplers.md; `drawn_by.png`, the same noise through every sampler.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import ldm_jax
from ldm_jax.data.sources import EmojiSource
from ldm_jax.diffusion.editing import slerp
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.gallery import Edit
from ldm_jax.pictures import image_grid, save_png, to_uint8
from ldm_jax.runtime.compile_cache import use_compile_cache

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
MARGIN, GAP = 176, 4  # of a labelled sheet, in pixels
PROMPTS = ("red apple", "cat face", "smiling face with sunglasses", "rocket", "rainbow", "octopus")


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
    source = EmojiSource("train")
    chosen = np.linspace(0, len(source) - 1, 128).round().astype(int)
    captions = [source[i]["caption"] for i in chosen]
    save_png(PICTURES / "shipped.png", image_grid(to_uint8(pipe(captions)), 16))


def edits(pipe: ldm_jax.Pipeline) -> None:
    source = EmojiSource("train")
    captions = [source[i]["caption"] for i in range(len(source))]
    cat = source[captions.index("cat face")]["image"]
    mask = np.zeros((64, 64), bool)
    mask[34:] = True
    wide = np.pad(cat, ((0, 0), (32, 32), (0, 0)), mode="edge")
    beside = np.ones((64, 128), bool)
    beside[:, 32:96] = False
    animals = ["smiling cat with heart-eyes", "tiger face", "monkey face", "fox", "dog face"]
    path = "cat.png"
    save_png(path, cat)
    inverted, _ = Edit(path, source="cat face").arguments(pipe, 50)
    Path(path).unlink()
    ends = [pipe.noise(seed)[0] for seed in (4, 5)]
    between = np.asarray(slerp(*ends, np.linspace(0.0, 1.0, 7)))
    hidden = np.where(mask[..., None], np.uint8(200), cat)

    def to_bytes(images):
        return list(to_uint8(images))

    rows = {
        "image to image,\nstrength 0.02 … 0.5": [
            cat,
            *(
                to_bytes(pipe("dog face", image=cat, strength=s, guidance=1.0))[0]
                for s in (0.02, 0.06, 0.1, 0.2, 0.5)
            ),
        ],
        "inpainting,\nfive prompts": [hidden, *to_bytes(pipe(animals, image=cat, mask=mask))],
        "outpainting": [cat, *to_bytes(pipe("red heart", image=wide, mask=beside, n=2, tile=64))],
        "inversion, then\nanother prompt": [
            cat,
            *(
                to_bytes(pipe(p, **inverted, guidance=1.0))[0]
                for p in ("cat face", "dog face", "tiger face", "monkey face")
            ),
        ],
        "from one seed's noise to\nthe next, no prompt": to_bytes(
            pipe("", n=7, latents=between, guidance=1.0)
        ),
        "larger than trained,\nin tiles": to_bytes(
            pipe(["water wave", "sunrise over mountains"], width=192, tile=64)
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
    for draw in (shipped, edits, drawn_by):
        draw(pipeline)
