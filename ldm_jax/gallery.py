"""Draws pictures into files: the library call behind `sample.py`."""

import contextlib
import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm_jax.condition_files import condition_arguments
from ldm_jax.conditions.requests import label_name, parts
from ldm_jax.data.images import composite, read_image, read_mask
from ldm_jax.diffusion.editing import slerp
from ldm_jax.diffusion.plan import Guidance, Sampling, flags, from_flags
from ldm_jax.first_stage import FirstStage
from ldm_jax.loading import load
from ldm_jax.pictures import centre, fit_picture, image_grid, save_png, split_depth, to_uint8
from ldm_jax.pipeline import Pipeline
from ldm_jax.version import __version__

log = logging.getLogger(__name__)

LONG_RUN = 3000  # pictures × steps from which on a progress bar is worth its cost
FRAME_MS = 80  # of an animated interpolation


def load_drawing(path: str, dtype: str = "float32") -> Pipeline:
    """As `load`, but raises ValueError for an autoencoder alone."""
    pipe = load(path, dtype)
    if isinstance(pipe, FirstStage):
        raise ValueError(
            f"{path} holds an autoencoder alone, which draws nothing by itself: train a model on "
            f"its latents (train.py --config=configs/txt2img.py --config.first_stage={path} "
            "--workdir=RUN) and draw with that one (--model=RUN)"
        )
    return pipe


def with_loras(pipe: Pipeline, given: Sequence[str]) -> Pipeline:
    """The pipeline with LoRAs, each "PATH" or "PATH:SCALE"; see `Pipeline.with_lora`."""
    for text in given:
        path, scale = text, 1.0
        with contextlib.suppress(ValueError):  # a colon in a path alone
            head, _, tail = text.rpartition(":")
            path, scale = (head, float(tail)) if head else (text, 1.0)
        pipe = pipe.with_lora(path, scale)
    return pipe


def with_embeddings(pipe: Pipeline, given: Sequence[str]) -> Pipeline:
    """The pipeline with new tokens, each "PATH" or "PATH:NAME"; see `Pipeline.with_embedding`."""
    for text in given:
        head, _, name = text.rpartition(":")
        whole = not head or Path(text).expanduser().exists()
        pipe = pipe.with_embedding(text) if whole else pipe.with_embedding(head, name)
    return pipe


def with_controls(pipe: Pipeline, given: Sequence[str]) -> tuple[Pipeline, dict[str, str]]:
    """The pipeline with ControlNets or T2I-Adapters, each "PATH:HINT" or "PATH:HINT:SCALE", and
    the files of their hints by name; see `Pipeline.with_control`.

    Raises ValueError for one without a hint.
    """
    hints: dict[str, str] = {}
    for text in given:
        path, hint, scale = _with_picture("--control", text, "the hint", "HINT")
        pipe = pipe.with_control(path, scale)
        hints[pipe.model.embedders[-1].name] = hint
    return pipe, hints


def with_ip_adapters(
    pipe: Pipeline, given: Sequence[str], encoder: str = ""
) -> tuple[Pipeline, dict[str, np.ndarray]]:
    """The pipeline with IP-Adapters, each "PATH:PICTURE" or "PATH:PICTURE:SCALE", and the pictures
    by name; see `Pipeline.with_ip_adapter`.

    Raises ValueError for one without a picture.
    """
    pictures: dict[str, np.ndarray] = {}
    for text in given:
        path, picture, scale = _with_picture("--ip_adapter", text, "the prompt", "PICTURE")
        pipe = pipe.with_ip_adapter(path, encoder, scale)
        shown = composite(read_image(picture), (255, 255, 255))
        pictures[pipe.model.embedders[-1].name] = shown
    return pipe, pictures


def _with_picture(flag: str, text: str, what: str, name: str) -> tuple[str, str, float]:
    """(path, picture, scale) of "PATH:PICTURE" or "PATH:PICTURE:SCALE"."""
    rest, scale = text, 1.0
    with contextlib.suppress(ValueError):
        head, _, tail = text.rpartition(":")
        rest, scale = head, float(tail)
    path, _, picture = rest.rpartition(":")
    if not path or not picture:
        raise ValueError(f"{flag}={text}: name {what}, a picture, after a colon: PATH:{name}")
    return path, str(Path(picture).expanduser()), scale


@dataclasses.dataclass(frozen=True)
class Edit:
    """A picture file to change, from the flags of `sample.py`.

    `mask` is a file, white or opaque where the picture is redrawn, see `read_mask`. `outpaint` adds
    pixels (left, top, right, bottom) and draws them. With `source`, a prompt that describes the
    picture, the picture is inverted to noise and drawn from there, by default without guidance.
    `fit`, of `pictures.FITS`, is applied to a picture, outpainted or not, whose sides are not
    multiples of the model's; after "pad" the result is cut to the original size.
    """

    image: str
    mask: str = ""
    outpaint: tuple[int, ...] = ()
    source: str = ""
    fit: str = "crop"

    def arguments(self, pipe: Pipeline, steps: int) -> tuple[dict[str, Any], tuple[int, int]]:
        """The arguments for `pipe`, and the size (height, width) to which to cut the result.

        Raises:
          ValueError: files that do not belong together, or cannot be fitted.
        """
        if self.source and (self.mask or self.outpaint):
            raise ValueError("a picture is inverted (--source) whole: no mask, no outpainting")
        image, mask = self._read()
        asked, given = image.shape[:2], image
        image = fit_picture(image, pipe.multiple, self.fit)
        size = asked if self.fit == "pad" else image.shape[:2]
        if image.shape != given.shape:
            sizes = [f"{height}×{width}" for height, width in (asked, image.shape[:2])]
            log.info(
                "%s: %s (height×width) becomes %s, multiples of %d, by fit=%s",
                self.image, *sizes, pipe.multiple, self.fit,
            )  # fmt: skip
        if self.source:
            made = pipe.invert(image, self.source, steps)
            return {"latents": made, "height": image.shape[0], "width": image.shape[1]}, size
        if mask is None:
            return {"image": image}, size
        mask = fit_picture(mask, pipe.multiple, self.fit, binary=True)
        return {"image": image, "mask": mask}, size

    def _read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The picture and its mask, both grown by `outpaint`."""
        image = composite(read_image(self.image), (255, 255, 255))
        mask = read_mask(self.mask) if self.mask else None
        if mask is not None and mask.shape != image.shape[:2]:
            raise ValueError(
                f"{self.mask} is {mask.shape[0]}×{mask.shape[1]} (height×width): a mask is as "
                f"large as its picture, {image.shape[0]}×{image.shape[1]}"
            )
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
        return image, mask


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
    files: Mapping[str, str] = MappingProxyType({}),
    loras: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    controls: Sequence[str] = (),
    ip_adapters: Sequence[str] = (),
    image_encoder: str = "",
    prompt_syntax: str = "plain",
    interpolate: int = 0,
    previews: int = 0,
) -> Path:
    """Draws `settings["n"]` pictures of each prompt into the directory `out`; returns its grid.

    Without prompts it draws each of `settings["labels"]`, numbers or names of classes, or, for an
    unconditional model, nothing in particular. The depth of LDM3D's pictures becomes a 16-bit PNG.

    Every PNG's text chunk "ldm_jax" and `settings.json` hold all settings to draw it again.
    `settings` are the flags of `sample.py` by their names: arguments of `Pipeline.__call__`, and
    fields of `Guidance` and `Sampling`; None is the default. `weak_pipe` is the pipeline of
    autoguidance, from the file `weak`. `files` are conditions, by their flags: see
    `condition_arguments`. `loras`, `embeddings`, `controls` and `ip_adapters`, with the last one's
    `image_encoder`, change the model: see `with_loras` and the like. `prompt_syntax` is one of
    `Pipeline.with_prompt_syntax`.
    `interpolate` draws this many pictures of one prompt between the noise of the seed and that of
    the next, and `interpolation.gif`. `previews` adds `previews.png`: the model's predictions at
    this many steps, a row for each picture.
    """
    out, pipe = Path(out), with_embeddings(with_loras(pipe, loras), embeddings)
    pipe, hints = with_controls(pipe, controls)
    pipe, shown = with_ip_adapters(pipe, ip_adapters, image_encoder)
    if prompt_syntax != "plain":
        pipe = pipe.with_prompt_syntax(prompt_syntax)
    weak_pipe = None if weak_pipe is None else with_embeddings(weak_pipe, embeddings)
    if settings.get("guidance") is None:
        inverted = edit is not None and edit.source
        settings = settings | {"guidance": 1.0 if inverted else pipe.config["sampling"]["guidance"]}
    if settings.get("steps") is None:
        settings = settings | {"steps": pipe.config["sampling"].get("steps", 50)}
    labels = [label_name(label, pipe.classes) for label in settings.get("labels") or ()]
    names = prompts or labels or ["sample"]
    arguments, size = ({}, None) if edit is None else edit.arguments(pipe, settings["steps"])
    if interpolate:
        if len(names) != 1 or edit is not None:
            raise ValueError("interpolation draws one prompt from noise")
        settings = settings | {"n": interpolate}
        ends = [
            pipe.noise(settings["seed"] + i, 1, settings.get("height"), settings.get("width"))[0]
            for i in (0, 1)
        ]
        arguments["latents"] = slerp(*ends, np.linspace(0.0, 1.0, interpolate))
    if edit is not None and edit.source and len(names) * settings["n"] != 1:
        raise ValueError("an inverted picture (--source) is drawn once, with one prompt")
    count = settings["n"] if settings.get("compose") else len(names) * settings["n"]
    batches = len(parts(count, settings.get("batch"))) if count > 0 else 1
    bar = count * settings["steps"] >= LONG_RUN
    watch = _Watch(settings["steps"], batches, previews, bar)
    if edit is not None and edit.source and settings.get("sampler") is None:
        settings = settings | {"sampler": "ddim"}  # which the inversion is of
    sampling = from_flags(Sampling, settings)
    guidance = from_flags(Guidance, settings | {"weak": weak_pipe})
    apart = flags(Sampling).keys() | flags(Guidance).keys()
    own = {k: v for k, v in settings.items() if v is not None and k not in apart}
    own |= condition_arguments(pipe, files, settings.get("height"), settings.get("width"), hints)
    own |= {"conditions": own.get("conditions", {}) | shown} if shown else {}
    arguments |= own | {"sampler": sampling, "guidance": guidance}
    with watch:
        made = pipe(prompts or None, **arguments, progress=watch.callback)
    made = made if size is None else centre(made, size, axis=1)
    images, depth = split_depth(made) if made.shape[-1] == 6 else (to_uint8(made), None)

    about = {"model": model or "bundled", "version": __version__, **settings}
    about |= {} if edit is None else {"edit": dataclasses.asdict(edit)}
    about |= {"weak": weak} if weak else {}
    about |= dict(files) | ({"lora": list(loras)} if loras else {})
    about |= {"embedding": list(embeddings)} if embeddings else {}
    about |= {"control": list(controls)} if controls else {}
    about |= {"ip_adapter": list(ip_adapters)} if ip_adapters else {}
    about |= {"image_encoder": image_encoder} if image_encoder else {}
    about |= {"interpolate": interpolate} if interpolate else {}
    about |= {"prompt_syntax": prompt_syntax} if prompt_syntax != "plain" else {}
    asked = {"prompts": prompts} | ({"classes": labels} if labels else {})
    names = [" AND ".join(names)] if settings.get("compose") else names
    for i, image in enumerate(images):
        prompt = names[i // settings["n"]]
        slug = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:40]
        name = f"{i:04d}-{slug}".rstrip("-")
        save_png(out / f"{name}.png", image, about | {"prompt": prompt, "index": i})
        if depth is not None:
            save_png(out / f"{name}-depth.png", depth[i], about | {"prompt": prompt, "index": i})
    columns = settings["n"] if len(names) > 1 and settings["n"] > 1 else min(len(images), 8)
    grid = out / "grid.png"
    save_png(grid, image_grid(images, columns), about | asked)
    if interpolate:
        frames = [Image.fromarray(image) for image in images]
        frames = frames + frames[-2:0:-1]  # forwards and backwards
        path = out / "interpolation.gif"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    if watch.seen:  # an edit of strength 0 runs no step
        columns = [
            np.concatenate([to_uint8(pipe.decode(x0)[..., :3]) for x0 in watch.seen[step]])[:count]
            for step in sorted(watch.seen)
        ]
        rows = np.stack([centre(column, images.shape[1:3], axis=1) for column in columns], axis=1)
        rows = rows.reshape(-1, *images.shape[1:])
        save_png(out / "previews.png", image_grid(rows, len(columns)), about | asked)
    (out / "settings.json").write_text(json.dumps(about | asked, indent=2) + "\n")
    return grid


class _Watch:
    """Observes a sampler while it runs: a progress bar, and some of its predictions.

    A program that calls back to the host cannot be stored in the compilation cache, and a short run
    spends most of its time compiling, so `callback` is None unless it is needed.
    """

    def __init__(self, steps: int, batches: int, previews: int, bar: bool):
        self.steps, self.batches, self.bar = steps, batches, bar
        self.wanted = set(np.linspace(1, steps, min(previews, steps)).round().astype(int).tolist())
        self.seen: dict[int, list[np.ndarray]] = {}  # of each batch
        self.reports: dict[int, int] = {}
        self.callback = self._report if bar or previews else None

    def __enter__(self) -> "_Watch":
        total = self.steps * self.batches
        self.tqdm = tqdm(total=total, unit="step", dynamic_ncols=True, disable=not self.bar)
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            jax.effects_barrier()  # the last report may not have arrived
        self.tqdm.close()

    def _report(self, done, x0) -> None:
        done = int(done)
        before = self.reports.get(done, 0)  # batches that have finished this step
        self.reports[done] = before + 1
        self.tqdm.update(before * self.steps + done - self.tqdm.n)
        if done in self.wanted:
            self.seen.setdefault(done, []).append(np.asarray(x0))
