"""Pictures of prompts as files: PNGs, a grid, and the settings that made them."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from ldm_jax.pictures import image_grid, save_png, to_uint8
from ldm_jax.pipeline import Pipeline
from ldm_jax.version import __version__

LONG_RUN = 3000  # pictures × steps from which on a progress bar is worth more than what it costs


def draw(
    pipe: Pipeline, prompts: list[str], settings: dict[str, Any], out: str | Path, model: str = ""
) -> Path:
    """Draws `settings["n"]` pictures of each prompt into the directory `out`; returns its grid.

    Every PNG's text chunk "ldm_jax" and `settings.json` hold what is needed to make it again.
    `settings` are arguments of `Pipeline.__call__`.
    """
    out = Path(out)
    if settings["guidance"] is None:
        settings = settings | {"guidance": pipe.config["sampling"]["guidance"]}
    with _progress(settings, len(prompts) * settings["n"]) as progress:
        images = to_uint8(pipe(prompts, **settings, progress=progress))
    about = {"model": model or "shipped", "version": __version__, **settings}
    for i, image in enumerate(images):
        prompt = prompts[i // settings["n"]]
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
        save_png(out / f"{i:04d}-{slug}.png", image, about | {"prompt": prompt, "index": i})
    columns = settings["n"] if len(prompts) > 1 and settings["n"] > 1 else min(len(images), 8)
    grid = out / "grid.png"
    save_png(grid, image_grid(images, columns), about | {"prompts": prompts})
    (out / "settings.json").write_text(json.dumps(about | {"prompts": prompts}, indent=2) + "\n")
    return grid


@contextlib.contextmanager
def _progress(settings: dict[str, Any], count: int) -> Iterator[Callable[[int], None] | None]:
    """Shows the sampler's steps on a long run; None on a short one.

    A program that calls back to the host cannot be kept in the compilation cache, and on a short
    run compiling is what would take the time.
    """
    if count * settings["steps"] < LONG_RUN:
        yield None
        return
    with tqdm(total=settings["steps"], unit="step", dynamic_ncols=True) as bar:
        yield lambda done: bar.update(int(done) - bar.n)
        jax.effects_barrier()  # the last report may still be on its way
