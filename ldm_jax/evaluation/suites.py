"""Pictures of the prompts of GenEval, DPG-Bench and HPSv2, in the folders that their own code reads.

| benchmark | prompts | folder, which holds nothing else |
|---|---|---|
| `geneval` (djghosh13/geneval) | `evaluation_metadata.jsonl` | `00000/samples/00000.png` … 4 pictures of each prompt, its line in `00000/metadata.jsonl` |
| `dpg` (TencentQQGYLab/ELLA) | folder `dpg_bench/prompts` of `NAME.txt` | `NAME.png`, 4 pictures in a square |
| `hpsv2` (tgxs002/HPSv2) | folder of `anime.json`, `concept-art.json`, `paintings.json` and `photo.json`, or one of them | `anime/00000.jpg` … one picture of each |
"""  # noqa: E501

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm_jax.data.text_files import read_text
from ldm_jax.diffusion.plan import Guidance, Sampling
from ldm_jax.evaluation.drawing import needed
from ldm_jax.pictures import save_png, to_uint8
from ldm_jax.pipeline import Pipeline
from ldm_jax.version import __version__

STYLES = ("anime", "concept-art", "paintings", "photo")
JPEG = dict(quality=95, subsampling=0)


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt, the files of its pictures in the folder, and the text files beside them.

    With fewer files than pictures the pictures go into one file, in a square.
    """

    prompt: str
    files: tuple[str, ...]
    beside: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Suite:
    """A benchmark: how many pictures a prompt has, how its prompts are read, as groups of items,
    and how its own code is called on a folder of pictures of a side."""

    pictures: int
    read: Callable[[Path], dict[str, list[Item]]]
    then: str


def _read_geneval(path: Path) -> dict[str, list[Item]]:
    if path.is_dir():
        path = path / "evaluation_metadata.jsonl"
    items = []
    for number, line in enumerate(_text(path).splitlines()):
        if not line.strip():
            continue
        about = _json(line, f"{path}, line {number + 1}")
        prompt = about.get("prompt") if isinstance(about, dict) else None
        if not isinstance(prompt, str) or "tag" not in about:
            raise ValueError(
                f"{path}, line {number + 1}: expected an object with prompt and tag, as in "
                "GenEval's evaluation_metadata.jsonl"
            )
        folder = f"{len(items):05d}"
        files = tuple(f"{folder}/samples/{i:05d}.png" for i in range(4))
        items.append(Item(prompt, files, ((f"{folder}/metadata.jsonl", line.strip()),)))
    return {"": items}


def _read_dpg(path: Path) -> dict[str, list[Item]]:
    if not path.is_dir():
        raise ValueError(f"{path} is no folder: DPG-Bench has its prompts in files, NAME.txt")
    files = sorted(path.glob("*.txt"))
    # Its code takes a picture's name up to the first dot.
    return {"": [Item(_text(f).strip(), (f"{f.name.partition('.')[0]}.png",)) for f in files]}


def _read_hpsv2(path: Path) -> dict[str, list[Item]]:
    files = [path / f"{style}.json" for style in STYLES] if path.is_dir() else [path]
    groups = {}
    for file in files:
        prompts = _json(_text(file), str(file))
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"{file}: expected a list of prompts, as in HPSv2's anime.json")
        style = file.stem
        groups[style] = [Item(p, (f"{style}/{i:05d}.jpg",)) for i, p in enumerate(prompts)]
    return groups


SUITES = {
    "geneval": Suite(4, _read_geneval, "python evaluation/evaluate_images.py {out}"),
    "dpg": Suite(4, _read_dpg, "bash dpg_bench/dist_eval.sh {out} {side}"),
    "hpsv2": Suite(1, _read_hpsv2, "python -c \"import hpsv2; hpsv2.evaluate('{out}')\""),
}


def draw_suite(
    pipe: Pipeline,
    benchmark: str,
    prompts: str | os.PathLike,
    out: str | os.PathLike,
    count: int | None = None,
    guidance: float | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    seed: int = 0,
    batch: int = 16,
    model: str = "",
) -> str:
    """Draws the pictures of a benchmark into the folder `out`; returns how its own code is called.

    The settings go into `OUT.json` beside the folder, and into each PNG. Pictures that exist are
    kept: a run that was stopped goes on, and its pictures are those of a run that was not. A
    picture depends on the settings and on its prompt's place in the file.

    Args:
      benchmark: of `SUITES`.
      prompts: its file or folder of prompts.
      count: only so many prompts, of HPSv2 in each style; None: all.
      guidance, steps, sampler: None: the model's own.
      batch: pictures drawn at a time; of settings, because the noise depends on it.
      model: what `pipe` was loaded from, for the settings.

    Raises:
      FileNotFoundError, ValueError: no such prompts, or other ones; a model that is not of text
        alone; or `out` has pictures of other settings.
    """
    suite, out = SUITES[benchmark], Path(out).expanduser()
    told = needed(pipe)
    if told != {"caption"}:
        what = ", ".join(sorted(told)) or "nothing"
        raise ValueError(f"a benchmark of prompts needs a model of text alone; this is told {what}")
    for name, value in (("count", count), ("batch", batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: one or more")
    groups = suite.read(Path(prompts).expanduser())
    _check(groups, prompts)
    text = json.dumps([[item.prompt for item in items] for items in groups.values()])
    own = pipe.config["sampling"]
    about = {
        "benchmark": benchmark,
        "prompts": hashlib.sha256(text.encode()).hexdigest()[:16],
        "model": model or "bundled",
        "weights": _fingerprint(pipe.params),
        "image_size": pipe.config["image_size"],
        "guidance": Guidance.of(guidance, own["guidance"]).scale,
        "steps": own.get("steps", 50) if steps is None else steps,
        "sampler": Sampling.of(sampler, own).sampler,
        "seed": seed,
        "batch": batch,
        "version": __version__,
    }
    about = json.loads(json.dumps(about))  # as it will be read
    _keep_settings(out, about)
    together = max(1, batch // suite.pictures)
    drawing = {name: about[name] for name in ("guidance", "steps", "sampler")}
    with tqdm(total=sum(len(i[:count]) for i in groups.values()), unit="prompt") as bar:
        for items in groups.values():
            for start, some in _parts(items[:count], together):
                if not all((out / file).is_file() for item in some for file in item.files):
                    # All parts are of one size, so that nothing is compiled for the last one.
                    asked = [item.prompt for item in some]
                    asked += asked[-1:] * (together - len(asked))
                    images = to_uint8(pipe(asked, n=suite.pictures, seed=seed + start, **drawing))
                    images = images.reshape(together, suite.pictures, *images.shape[1:])
                    for item, several in zip(some, images, strict=False):
                        _write(out, item, several, about)
                bar.update(len(some))
    return suite.then.format(out=out.absolute(), side=about["image_size"])


def _fingerprint(params: Any) -> str:
    """Of the first numbers of each array: a run that trained on has others."""
    first = [np.asarray(leaf).reshape(-1)[:16].tobytes() for leaf in jax.tree.leaves(params)]
    return hashlib.sha256(b"".join(first)).hexdigest()[:16]


def _check(groups: dict[str, list[Item]], prompts: str | os.PathLike) -> None:
    items = [item for group in groups.values() for item in group]
    if not items:
        raise ValueError(f"{prompts} holds no prompts")
    files: set[str] = set()
    for item in items:
        if not item.prompt:
            raise ValueError(f"{prompts}: the prompt of {item.files[0]} is empty")
        if files & set(item.files):
            raise ValueError(f"{prompts}: two prompts have the picture {item.files[0]}")
        files |= set(item.files)


def _parts(items: Sequence[Item], size: int) -> Iterator[tuple[int, Sequence[Item]]]:
    for start in range(0, len(items), size):
        yield start, items[start : start + size]


def _keep_settings(out: Path, about: dict[str, Any]) -> None:
    """Writes the settings, or checks that those that are there are the same."""
    path = out.with_name(out.name + ".json")
    if path.is_file():
        there = _json(_text(path), str(path))
        for name, value in about.items():
            if name != "version" and there.get(name) != value:
                raise ValueError(
                    f"{out} has pictures of {name}={there.get(name)!r}, and {value!r} is asked "
                    f"for: choose another folder, or remove it and {path.name}"
                )
        return
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty, and {path.name} beside it does not say of what")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _write(out: Path, item: Item, images: np.ndarray, about: dict[str, Any]) -> None:
    """Writes what is missing, each file whole or not at all."""
    if len(item.files) < len(images):
        rows = images.reshape(2, 2, *images.shape[1:]).swapaxes(1, 2)
        images = rows.reshape(1, 2 * images.shape[1], 2 * images.shape[2], -1)
    for name, text in item.beside:
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name, image in zip(item.files, images, strict=True):
        path = out / name
        if path.is_file():
            continue
        part = path.with_name(f".{path.name}.part")
        if path.suffix == ".png":
            save_png(part, image, about | {"prompt": item.prompt})
        else:
            part.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(part, format="JPEG", **JPEG)
        os.replace(part, path)


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, where prompts were expected")
    return read_text(path)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
