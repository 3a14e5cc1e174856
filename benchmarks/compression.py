"""The comparison of the models that `configs/compression.py` trains.

    python -m benchmarks.compression --workdir=runs/compression
    python -m benchmarks.compression --costs

The sweep calls it when its runs are finished; alone it compares what there is. It draws with each
model in several numbers of steps and measures the pictures, once: `drawn.json` keeps what was
found. Then it writes `compression.md`, two tables, the plots `training.png` and `steps.png`, of the
kind of figures 6 and 7 of Rombach et al. 2022, and `pictures.png`, the same pictures of all models.

The second prints what a training step of 32 pictures costs for each factor: GFLOP and seconds of a
processor, the least of three steps.
"""

import argparse
import json
import logging
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from configs.compression import UNETS, get_config
from ldm_jax.data.sources import open_source
from ldm_jax.evaluation.drawing import drawn_metrics, real_pictures, spaced
from ldm_jax.interop.opening import open_any
from ldm_jax.loading import load
from ldm_jax.metrics.extractors import load_extractor
from ldm_jax.metrics.scene_tasks import judge
from ldm_jax.pictures import image_grid, save_png
from ldm_jax.runtime.logging import read_metrics
from ldm_jax.runtime.mesh import make_mesh
from ldm_jax.runtime.plan import measure
from ldm_jax.training.program import abstract_state, lower_step
from ldm_jax.training.sweeps import finished
from ldm_jax.training.tasks import make_task

log = logging.getLogger("ldm_jax.benchmarks")

COUNT = 256  # pictures of each measurement
STEPS = (5, 10, 20, 50, 100, 200)
MOST = {1: 50, 2: 100}  # steps of the factors that draw slowest
COLORS = {1: "#555555", 2: "#aa00aa", 4: "#dd5500", 8: "#1177bb", 16: "#009900", 32: "#aa8800"}
WIDTH, HEIGHT, LEFT, BELOW = 520, 400, 62, 48

Curve = list[tuple[float, float]]


def runs_of(root: Path) -> dict[int, Path]:
    """The diffusion models in a directory whose pictures were measured at least once, by factor."""
    found = {}
    for path in root.iterdir():
        name = re.fullmatch(r"(?:smoke-)?f(\d+)", path.name)
        if name and any(line["kind"] == "distance" for line in read_metrics(path)):
            found[int(name[1])] = path
    return dict(sorted(found.items()))


def training(run: Path, factor: int) -> dict[str, Any]:
    """What training took and reached: totals, and curves (pictures, value) of `fd` and `loss`."""
    lines, config = read_metrics(run), json.loads((run / "config.json").read_text())
    batch, reports = config["train"]["batch_size"], [x for x in lines if x["kind"] == "train"]
    steps = np.diff([0] + [line["step"] for line in reports])
    speeds = [line["images_per_second"] for line in reports]
    each = np.median([line["tflops"] * batch / line["images_per_second"] for line in reports])
    curves = {
        name: [(x["step"] * batch, x[metric]) for x in lines if x["kind"] == kind]
        for name, kind, metric in (("fd", "distance", "fd"), ("loss", "held_out", "loss"))
    }
    return curves | {
        "steps": int(steps.sum()),
        "pictures": int(steps.sum() * batch),
        "tflop": float(each * steps.sum()),
        "minutes": float((steps * batch / speeds).sum() / 60),
        "seconds": UNETS[factor]["step"] * float(steps.sum()) * batch / 32,
        "floor": next(x["fd_floor"] for x in lines if x["kind"] == "distance"),
    }


def draw(run: Path, steps: Sequence[int], kept: dict[str, Any], count: int, real: Any) -> Any:
    """Measures the pictures of a model in each of these steps, unless `kept` has them.

    A generator of (key, numbers, pictures). `real` is a list that gets the real pictures' features
    when they are needed first.
    """
    missing = [n for n in steps if f"{run.name}/{n}" not in kept]
    if not missing:
        return
    pipe, opened = load(run), open_any(run)
    data = opened.config["data"] | dict(path="", image_size=opened.config["image_size"])
    source = open_source(_Section(data), "train")
    extract = load_extractor()
    if not real:
        real.append(real_pictures(source, (), extract, {"split": "train"}))
    indices = spaced(source, count)
    examples, scenes = [source[i] for i in indices], [source.scene(i) for i in indices]
    for n in missing:
        found = drawn_metrics(pipe, source, count, extract=extract, real=real[0], steps=n)
        right = judge(found.images, {"label"}, examples, scenes, source)["class"]
        numbers = {"fd": found.metrics["fd"], "interval": list(found.intervals["fd"])}
        numbers |= {"class": right, "seconds": _seconds(pipe, n), "count": count}
        yield f"{run.name}/{n}", numbers, found.images


class _Section(dict):
    """A dict with its entries as attributes, as `open_source` reads them."""

    __getattr__ = dict.__getitem__


def _seconds(pipe: Any, steps: int) -> float:
    """Of a processor, for a picture of a batch of 64 of a program that is compiled."""
    labels = [pipe.classes[0]] * 64
    began = time.process_time()
    pipe(labels=labels, n=1, steps=steps)
    return (time.process_time() - began) / 64


def compare(root: Path, steps: Sequence[int] | None = None, count: int | None = None) -> None:
    """Writes the comparison of the runs in `root`; those that are not finished yet draw nothing.

    Args:
      steps: of drawing; None: `STEPS`, up to `MOST`.
      count: of pictures; None: `COUNT`, or 8 with `steps`.
    """
    runs = runs_of(root)
    if not runs:
        raise ValueError(f"no run f1 … f32 in {root} has measured pictures")
    count = count or (COUNT if steps is None else 8)
    path, real = root / "drawn.json", []
    kept = json.loads(path.read_text()) if path.exists() else {}
    for factor in [factor for factor in UNETS if factor in runs]:  # the most telling first
        run = runs[factor]
        if not finished(run):
            continue
        own = [n for n in STEPS if n <= MOST.get(factor, max(STEPS))] if steps is None else steps
        for key, numbers, images in draw(run, own, kept, count, real):
            kept[key] = numbers
            log.info("%s steps: %s", key, numbers)
            path.write_text(json.dumps(kept, indent=1) + "\n")
            save_png(root / f"pictures-{key.replace('/', '-')}.png", image_grid(images[:16], 8))
    trained = {factor: training(run, factor) for factor, run in runs.items()}
    drawn = {
        factor: {
            int(key.rpartition("/")[2]): numbers
            for key, numbers in kept.items()
            if key.rpartition("/")[0] == run.name
        }
        for factor, run in runs.items()
    }
    write_tables(root, runs, trained, drawn)
    write_plots(root, runs, trained, drawn)
    print((root / "compression.md").read_text())


def reached(curve: Curve, target: float) -> float | None:
    """The first x of a curve whose value is at most `target`."""
    return next((x for x, y in curve if y <= target), None)


def write_tables(root: Path, runs: dict, trained: dict, drawn: dict) -> None:
    """`compression.md`."""
    first = trained.get(1)
    titles = ["", "latents", "PSNR of the first stage", "pictures", "TFLOP", "processor s", "loss"]
    titles += ["FD", "right kind", "pixels' FD after"]
    rows = []
    for factor, run in runs.items():
        row, config = trained[factor], json.loads((run / "config.json").read_text())
        side, channels = config["data"]["image_size"] // factor, config["unet"]["in_channels"]
        ends = [line for line in read_metrics(run.with_name(f"{run.name}-autoencoder"))]
        psnr = [line["psnr"] for line in ends if "psnr" in line]
        after = first and factor > 1 and reached(row["fd"], first["fd"][-1][1])
        share = after / row["pictures"] if after else None
        kinds = [numbers["class"] for _, numbers in sorted(drawn[factor].items())]
        rows.append(
            [
                f"f{factor}",
                f"{side}×{side}×{channels}",
                f"{psnr[-1]:.1f} dB" if psnr else "–",
                f"{row['pictures']:,}",
                f"{row['tflop']:.2f}",
                f"{row['seconds']:.0f}",
                f"{row['loss'][-1][1]:.3f}",
                f"{row['fd'][-1][1]:.1f}",
                f"{max(kinds):.0%}" if kinds else "",
                f"{after:,} pictures, {share * row['seconds']:.2g} s" if after else "–",
            ]
        )
    counts = sorted({n for numbers in drawn.values() for n in numbers})
    steps = [[f"f{factor}"] + [_cell(numbers.get(n)) for n in counts] for factor, numbers in
             drawn.items()]  # fmt: skip
    text = _table(titles, rows) + "\n\nFD (processor ms a picture), by the number of steps:\n\n"
    text += _table(["", *map(str, counts)], steps)
    floors = sorted({round(row["floor"], 1) for row in trained.values()})
    text += f"\n\nFD between halves of the real pictures: {', '.join(map(str, floors))}\n"
    (root / "compression.md").write_text(text)


def _cell(numbers: dict[str, Any] | None) -> str:
    return f"{numbers['fd']:.1f} ({1e3 * numbers['seconds']:.3g})" if numbers else ""


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_plots(root: Path, runs: dict, trained: dict, drawn: dict) -> None:
    """`training.png`, `steps.png` and `pictures.png`."""
    names = {factor: f"f{factor}" for factor in trained}
    by_pictures = {names[f]: row["fd"] for f, row in trained.items()}
    by_time = {
        names[f]: [(x / row["pictures"] * row["seconds"], y) for x, y in row["fd"]]
        for f, row in trained.items()
    }
    colors = {name: COLORS[factor] for factor, name in names.items()}
    panels = [
        plot(by_pictures, "training pictures seen", "Frechet distance", colors),
        plot(by_time, "seconds of a processor, training", "Frechet distance", colors),
    ]
    save_png(root / "training.png", np.concatenate(panels, axis=1))
    costs, marks = {}, {}
    for factor, numbers in drawn.items():
        order = sorted(numbers)
        costs[names[factor]] = [(1e3 * numbers[n]["seconds"], numbers[n]["fd"]) for n in order]
        marks[names[factor]] = [str(n) for n in order]
    title = "processor ms a picture, drawing (labels: steps)"
    save_png(root / "steps.png", plot(costs, title, "Frechet distance", colors, marks))
    rows = {}
    for factor, numbers in drawn.items():
        same = [n for n in numbers if n <= 20]
        if same:
            with Image.open(root / f"pictures-{runs[factor].name}-{max(same)}.png") as image:
                rows[names[factor]] = image.convert("RGB").crop(
                    (0, 0, min(image.width, 6 * 66), 66)
                )
    if rows:
        sheet = Image.new("RGB", (40 + max(row.width for row in rows.values()), 70 * len(rows)))
        sheet.paste("white", (0, 0, *sheet.size))
        pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
        for i, (name, row) in enumerate(rows.items()):
            sheet.paste(row, (40, 70 * i))
            pen.text((4, 70 * i + 33), name, "black", font, "lm")
        save_png(root / "pictures.png", np.asarray(sheet))


def plot(
    curves: dict[str, Curve],
    x_title: str,
    y_title: str,
    colors: dict[str, str],
    marks: dict[str, list[str]] | None = None,
) -> np.ndarray:
    """uint8 (H, W, 3): curves by name on logarithmic axes, with a label at each point if `marks`
    has them."""
    points = [point for curve in curves.values() for point in curve]
    logs = np.log(np.maximum(np.array(points, float), 1e-9))
    low, high = logs.min(axis=0), logs.max(axis=0)
    room = np.maximum(0.06 * (high - low), 0.02)
    low, high = low - room, high + room
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    right, top = WIDTH - 16, 34
    span = np.array([right - LEFT, top - (HEIGHT - BELOW)])

    def place(x: float, y: float) -> tuple[float, float]:
        share = (np.log(np.maximum([x, y], 1e-9)) - low) / (high - low)
        return float(LEFT + share[0] * span[0]), float(HEIGHT - BELOW + share[1] * span[1])

    for value in _ticks(*np.exp([low[0], high[0]])):
        at = place(value, math.exp(low[1]))[0]
        pen.line((at, top, at, HEIGHT - BELOW), fill="#e4e4e4")
        pen.text((at, HEIGHT - BELOW + 4), f"{value:g}", "black", font, "ma")
    for value in _ticks(*np.exp([low[1], high[1]])):
        at = place(math.exp(low[0]), value)[1]
        pen.line((LEFT, at, right, at), fill="#e4e4e4")
        pen.text((LEFT - 5, at), f"{value:g}", "black", font, "rm")
    pen.rectangle((LEFT, top, right, HEIGHT - BELOW), outline="black")
    pen.text(((LEFT + right) / 2, HEIGHT - 14), x_title, "black", font, "mm")
    pen.text((6, 6), y_title, "black", font, "la")
    for i, (name, curve) in enumerate(curves.items()):
        places = [place(*point) for point in curve]
        pen.line(places, fill=colors[name], width=2)
        for j, (x, y) in enumerate(places):
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colors[name])
            if marks:
                pen.text((x + 4, y - 3), marks[name][j], colors[name], font, "lb")
        pen.text((right - 48 * (len(curves) - i), 18), f"- {name}", colors[name], font, "lm")
    return np.asarray(sheet)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, over more than two powers the powers alone, and of a range
    that has less than two of them multiples of one."""
    parts = (1,) if high / low > 300 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [part * 10.0**power for power in powers for part in parts]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) < 2:
        power = 10.0 ** math.floor(math.log10((high - low) / 2))
        by = max(part * power for part in (1, 2, 5) if 2 * part * power <= high - low)
        ticks = [by * i for i in range(math.ceil(low / by), math.floor(high / by) + 1)]
    return ticks


def costs() -> None:
    """Prints a row for each factor."""
    print("     parameters   GFLOP   processor s")
    for factor in sorted(UNETS):
        config = get_config(f"f{factor}")
        if factor > 1:
            with config.unlocked():
                first_stage = get_config(f"f{factor}-autoencoder").autoencoder
                config.autoencoder = first_stage.to_dict() | dict(scale_factor=1.0)
        task, mesh = make_task(config, abstract=True), make_mesh(config.mesh)
        lowered = lower_step(task, config, mesh)
        params = jax.tree.leaves(abstract_state(task, config)[1].params)
        seconds = measure(lowered.lowered.compile(), clock=time.process_time)
        count = sum(leaf.size for leaf in params)
        print(f"f{factor:<3} {count:11,}  {lowered.flops / 1e9:6.2f}  {seconds:12.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, help="the sweep's")
    parser.add_argument("--costs", action="store_true", help="of a step; trains nothing")
    given = parser.parse_args()
    if given.costs == (given.workdir is not None):
        parser.error("give --workdir, or --costs")
    logging.basicConfig(level=logging.WARNING)
    log.setLevel(logging.INFO)
    costs() if given.costs else compare(given.workdir)


if __name__ == "__main__":
    main()
