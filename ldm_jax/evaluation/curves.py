"""Curves over guidance, steps and samplers: the settings, a table, and the Pareto plot."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# What may be swept, and how its values are read.
SWEPT = {"guidance": float, "steps": int, "sampler": str}
LOWER_IS_BETTER = ("fd", "kid", "fd_floor", "copied")
FIDELITY = ("fd", "miou", "masked_psnr", "agreement", "boxes", "class", "objects")
DIVERSITY = ("clip_score", "scene", "r@1", "recall", "group", "coverage", "relation")
MOST = 100  # settings
SIDE, MARGIN = 640, 80


def settings_of(sweeps: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of `NAME=VALUES`, where VALUES are "a,b,c", or "low:high" or
    "low:high:step" of numbers, both ends taken in (step 1).

    Raises:
      ValueError: an unknown name, a value of another kind, a name twice, or too many settings.
    """
    found: dict[str, list[Any]] = {}
    for text in sweeps:
        name, _, values = text.partition("=")
        if name not in SWEPT or not values:
            raise ValueError(
                f"--sweep={text}: expected NAME=VALUES with a name of {', '.join(SWEPT)}, such as "
                "guidance=1:8 or steps=10,20,50"
            )
        if name in found:
            raise ValueError(f"--sweep={text}: {name} is swept twice")
        try:
            found[name] = _values(values, SWEPT[name])
        except ValueError as error:
            raise ValueError(
                f"--sweep={text}: {values!r} is neither a list a,b,c nor low:high or low:high:step"
            ) from error
    settings = [
        dict(zip(found, several, strict=True)) for several in itertools.product(*found.values())
    ]
    if len(settings) > MOST:
        raise ValueError(f"--sweep asks for {len(settings)} settings: {MOST} at most")
    return settings


def _values(text: str, kind: type) -> list[Any]:
    if ":" not in text:
        return [kind(value) for value in text.split(",")]
    low, high, *step = (float(value) for value in text.split(":"))
    if len(step) > 1 or kind is str or low > high or any(s <= 0 for s in step):
        raise ValueError(text)
    by = step[0] if step else 1.0
    count = int(np.floor((high - low) / by + 1e-9)) + 1
    if count > MOST:
        raise ValueError(text)
    return [kind(low + i * by) for i in range(count)]


def table(results: Sequence[dict[str, Any]]) -> str:
    """The settings and numbers of all results, each number with its interval, in Markdown."""
    names = [
        name
        for name, value in results[0]["metrics"].items()
        if isinstance(value, float) and name not in ("psnr", "ssim")
    ]
    settings = list(results[0]["setting"])
    lines = [[*settings, *names], ["---"] * (len(settings) + len(names))]
    for result in results:
        metrics = result["metrics"]
        intervals = metrics.get("intervals", {})
        cells = [f"{v:g}" if isinstance(v, float) else str(v) for v in result["setting"].values()]
        for name in names:
            low, high = intervals.get(name, (None, None))
            width = "" if low is None else f" ({low:.4g} … {high:.4g})"
            cells.append(f"{metrics[name]:.4g}{width}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def axes(metrics: dict[str, Any]) -> tuple[str, str]:
    """The two metrics of the plot, along and up: diversity or agreement, and fidelity.

    Raises:
      ValueError: there are not two metrics.
    """
    numbers = [n for n, v in metrics.items() if isinstance(v, float) and np.isfinite(v)]
    up = next((name for name in FIDELITY if name in numbers), None)
    along = next((name for name in DIVERSITY if name in numbers and name != up), None)
    if up is None or along is None:
        raise ValueError(f"a plot needs a metric of {FIDELITY} and one of {DIVERSITY}")
    return along, up


def best(points: np.ndarray, lower: Sequence[bool]) -> np.ndarray:
    """Whether each of (N, 2) points is on the Pareto front: none other is at least as good in both
    and better in one. `lower`: of each axis whether less is better."""
    signed = points * np.where(lower, -1.0, 1.0)
    as_good = (signed[:, None] >= signed[None]).all(axis=2)
    better = (signed[:, None] > signed[None]).any(axis=2)
    return ~(as_good & better).any(axis=0)


def pareto_plot(results: Sequence[dict[str, Any]]) -> np.ndarray:
    """uint8 (H, W, 3): each setting a point with its intervals as bars and its label; the Pareto
    front is joined and filled."""
    along, up = axes(results[0]["metrics"])
    points = np.array([[r["metrics"][along], r["metrics"][up]] for r in results])
    ranges = np.array(
        [
            [r["metrics"].get("intervals", {}).get(n) or [r["metrics"][n]] * 2 for n in (along, up)]
            for r in results
        ]
    )
    low, high = ranges[..., 0].min(axis=0), ranges[..., 1].max(axis=0)
    room = np.maximum((high - low) * 0.08, 1e-9)
    low, high = low - room, high + room
    inner = SIDE - 2 * MARGIN

    def place(x: float, y: float) -> tuple[float, float]:
        share = (np.array([x, y]) - low) / (high - low)
        return float(MARGIN + share[0] * inner), float(SIDE - MARGIN - share[1] * inner)

    sheet = Image.new("RGB", (SIDE, SIDE), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.rectangle((MARGIN, MARGIN, SIDE - MARGIN, SIDE - MARGIN), outline="black")
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = low + share * (high - low)
        (left, _), (_, top) = place(x, low[1]), place(low[0], y)
        draw.line((left, SIDE - MARGIN, left, SIDE - MARGIN + 5), fill="black")
        draw.text((left, SIDE - MARGIN + 8), f"{x:.3g}", "black", font, "ma")
        draw.line((MARGIN - 5, top, MARGIN, top), fill="black")
        draw.text((MARGIN - 8, top), f"{y:.3g}", "black", font, "rm")
    lower = [name in LOWER_IS_BETTER for name in (along, up)]
    titles = [
        f"{n} ({'less' if less else 'more'} is better)"
        for n, less in zip((along, up), lower, strict=True)
    ]
    draw.text((SIDE / 2, SIDE - MARGIN / 2 + 8), titles[0], "black", font, "mm")
    draw.text((MARGIN, MARGIN / 2), titles[1], "black", font, "lm")
    front = best(points, lower)
    line = sorted(map(tuple, points[front]))
    draw.line([place(*point) for point in line], fill="#1f77b4", width=2)
    for result, (x, y), (wide, tall), there in zip(results, points, ranges, front, strict=True):
        draw.line([place(wide[0], y), place(wide[1], y)], fill="#bbbbbb")
        draw.line([place(x, tall[0]), place(x, tall[1])], fill="#bbbbbb")
        left, top = place(x, y)
        box = (left - 4, top - 4, left + 4, top + 4)
        draw.ellipse(box, fill="#1f77b4" if there else "white", outline="#1f77b4")
        label = ", ".join(
            f"{v:g}" if isinstance(v, float) else str(v) for v in result["setting"].values()
        )
        draw.text((left + 6, top - 6), label, "black", font, "ls")
    return np.asarray(sheet)
