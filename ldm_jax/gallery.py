"""Pictures to disk: what `sample.py` does, callable from anywhere."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm_jax.data.images import composite, read_image
from ldm_jax.diffusion.editing import slerp
from ldm_jax.pictures import image_grid, save_png, split_depth, to_uint8
from ldm_jax.pipeline import Pipeline
from ldm_jax.version import __version__

LONG_RUN = 3000  # pictures × steps from which on a progress bar is worth more than what it costs
FRAME_MS = 80  # of an animated interpolation


@dataclasses.dataclass(frozen=True)
class Edit:
    """A picture file to change, as `sample.py` names it.

    `mask` is a black and white file, white where to draw anew; `outpaint` grows the picture by
    pixels (left, top, right, bottom) and draws those. With `source`, a prompt that describes the
    picture, it is inverted to noise first and drawn from there, without guidance unless asked for.
    """

    image: str
    mask: str = ""
    outpaint: tuple[int, ...] = ()
    source: str = ""

    def arguments(self, pipe: Pipeline, steps: int) -> dict[str, Any]:
        """What to hand to `pipe`; raises ValueError for files that do not fit."""
        image = composite(read_image(self.image), (255, 255, 255))
        if self.source:
            if self.mask or self.outpaint:
                raise ValueError("a picture is inverted (--source) whole: no mask, no outpainting")
            return {"latents": pipe.invert(image, self.source, steps)}
        mask = read_image(self.mask)[..., 0] if self.mask else None
        if self.outpaint:
            if len(self.outpaint) != 4 or min(self.outpaint) < 0:
                raise ValueError(
                    f"outpaint {','.join(map(str, self.outpaint))}: give pixels to add at "
                    "left,top,right,bottom"
                )
            left, top, right, bottom = self.outpaint
            border = ((top, bottom), (left, right))
            mask = np.zeros(image.shape[:2], np.uint8) if mask is None else mask
            mask = np.pad(mask, border, constant_values=255)
            image = np.pad(image, (*border, (0, 0)), mode="edge")
        return {"image": image} if mask is None else {"image": image, "mask": mask}


def draw(
    pipe: Pipeline,
    prompts: list[str],
    settings: dict[str, Any],
    out: str | Path,
    *,
    model: str = "",
    edit: Edit | None = None,
    weak: str = "",
    weak_pipe: Pipeline | None = None,
    interpolate: int = 0,
    previews: int = 0,
) -> Path:
    """Draws `settings["n"]` pictures of each prompt into the directory `out`; returns its grid.

    Without prompts: of each of `settings["labels"]`, or of nothing, as the model is. Pictures with
    depth (LDM3D) leave it beside them as a PNG of 16 bits.

    Every PNG's text chunk "ldm_jax" and `settings.json` hold what is needed to make it again.
    `settings` are arguments of `Pipeline.__call__`; `weak_pipe` that of autoguidance, from the
    file `weak`. `interpolate` draws so many pictures of one prompt on the way from the noise of the
    seed to that of the next, and `interpolation.gif`. `previews` adds `previews.png`: what the
    model predicted at so many moments, a row for each picture.
    """
    out = Path(out)
    if settings.get("guidance") is None:
        inverted = edit is not None and edit.source
        settings = settings | {"guidance": 1.0 if inverted else pipe.config["sampling"]["guidance"]}
    names = prompts or [f"label {label}" for label in settings.get("labels") or ()] or ["sample"]
    arguments = {} if edit is None else edit.arguments(pipe, settings["steps"])
    if interpolate:
        if len(names) != 1 or edit is not None:
            raise ValueError("interpolation draws one prompt from noise")
        settings = settings | {"n": interpolate}
        ends = [
            pipe.noise(settings["seed"] + i, 1, settings["height"], settings["width"])[0]
            for i in (0, 1)
        ]
        arguments["latents"] = np.asarray(slerp(*ends, np.linspace(0.0, 1.0, interpolate)))
    if edit is not None and edit.source and len(names) * settings["n"] != 1:
        raise ValueError("an inverted picture (--source) is drawn once, with one prompt")
    count = settings["n"] if settings["compose"] else len(names) * settings["n"]
    watch = _Watch(settings["steps"], previews, bar=count * settings["steps"] >= LONG_RUN)
    with watch:
        made = pipe(
            prompts or None, **settings, **arguments, weak=weak_pipe, progress=watch.callback
        )
    images, depth = split_depth(made) if made.shape[-1] == 6 else (to_uint8(made), None)

    about = {"model": model or "shipped", "version": __version__, **settings}
    about |= {} if edit is None else {"edit": dataclasses.asdict(edit)}
    about |= {"weak": weak} if weak else {}
    about |= {"interpolate": interpolate} if interpolate else {}
    names = [" AND ".join(names)] if settings["compose"] else names
    for i, image in enumerate(images):
        prompt = names[i // settings["n"]]
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
        name = f"{i:04d}-{slug}"
        save_png(out / f"{name}.png", image, about | {"prompt": prompt, "index": i})
        if depth is not None:
            save_png(out / f"{name}-depth.png", depth[i], about | {"prompt": prompt, "index": i})
    columns = settings["n"] if len(names) > 1 and settings["n"] > 1 else min(len(images), 8)
    grid = out / "grid.png"
    save_png(grid, image_grid(images, columns), about | {"prompts": prompts})
    if interpolate:
        frames = [Image.fromarray(image) for image in images]
        frames = frames + frames[-2:0:-1]  # there and back
        path = out / "interpolation.gif"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    if watch.seen:  # an edit of strength 0 runs no step
        columns = [to_uint8(pipe.decode(x0)[..., :3]) for _, x0 in sorted(watch.seen.items())]
        rows = np.stack(columns, axis=1).reshape(-1, *images.shape[1:])
        save_png(out / "previews.png", image_grid(rows, len(columns)), about | {"prompts": prompts})
    (out / "settings.json").write_text(json.dumps(about | {"prompts": prompts}, indent=2) + "\n")
    return grid


class _Watch:
    """Looks on while the sampler runs: a progress bar, and some of its predictions.

    A program that calls back to the host cannot be kept in the compilation cache, and on a short
    run compiling is what would take the time, so `callback` is None unless there is a reason.
    """

    def __init__(self, steps: int, previews: int, bar: bool):
        self.steps, self.bar = steps, bar
        self.wanted = set(np.linspace(1, steps, min(previews, steps)).round().astype(int).tolist())
        self.seen: dict[int, np.ndarray] = {}
        self.callback = self._report if bar or previews else None

    def __enter__(self) -> "_Watch":
        self.tqdm = tqdm(total=self.steps, unit="step", dynamic_ncols=True, disable=not self.bar)
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            jax.effects_barrier()  # the last report may still be on its way
        self.tqdm.close()

    def _report(self, done, x0) -> None:
        self.tqdm.update(int(done) - self.tqdm.n)
        if int(done) in self.wanted:
            self.seen[int(done)] = np.asarray(x0)
