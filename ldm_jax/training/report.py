"""`report.html`: the curves, previews and config of a run, on one self-contained page."""

import base64
import html
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldm_jax.runtime.logging import read_metrics

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff }
h1, h2 { font-weight: 600 } table { border-collapse: collapse }
th { text-align: left } td, th { padding: .15em 1.5em .15em 0 }
td + td { font-variant-numeric: tabular-nums }
img { max-width: 100%; image-rendering: pixelated; border: 1px solid #ddd }
figure { margin: 1em 0 } figcaption { color: #777 } svg text { font-size: 11px; fill: #777 }
pre { background: #f6f6f6; padding: 1em; overflow: auto }
"""


COLORS = ("#17b", "#d50", "#090", "#a0a", "#088", "#a60", "#c05", "#555")

MAIN_SETTINGS = (
    *("task", "seed", "init_from", "precision", "data.source", "data.image_size"),
    *("train.steps", "train.batch_size", "train.ema_decay", "optimizer.name", "optimizer.lr"),
    *("optimizer.schedule", "diffusion.parameterization", "sampling.sampler", "sampling.steps"),
    *("sampling.guidance", "sampling.prompts", "sampling.labels"),
)
Points = list[tuple[float, float]]


ERROR = "_error"  # ends the name of a metric's standard error
DOTS = 40  # a line of at most so many points shows each


def curve(
    lines: dict[str, Points],
    title: str,
    errors: dict[str, Points] | None = None,
    width: int = 860,
    height: int = 180,
) -> str:
    """SVG lines through (step, value) points, by name, with the extremes of all as labels.

    `errors` has the standard errors of some lines, (step, error), drawn as bands.
    """
    errors = {name: dict(points) for name, points in (errors or {}).items()}
    ends = {
        name: [(x, y - e, y + e) for x, y in points for e in [errors.get(name, {}).get(x, 0.0)]]
        for name, points in lines.items()
    }
    every = [end for of_line in ends.values() for end in of_line]
    first, last = min(x for x, *_ in every), max(x for x, *_ in every)
    low, high = min(y for _, y, _ in every), max(y for *_, y in every)
    x_span, y_span = max(last - first, 1), (high - low) or 1.0

    def place(x, y):
        across = 50 + (x - first) / x_span * (width - 60)
        return f"{across:.1f},{height - 25 - (y - low) / y_span * (height - 45):.1f}"

    drawn, legend = "", ""
    for i, (name, points) in enumerate(lines.items()):
        color = COLORS[i % len(COLORS)]
        if name in errors:
            above = [place(x, y) for x, _, y in ends[name]]
            below = [place(x, y) for x, y, _ in ends[name]]
            around = " ".join(above + below[::-1])
            drawn += f'<polygon points="{around}" fill="{color}" opacity=".2"/>'
        places = [place(x, y) for x, y in points]
        line = " ".join(places)
        drawn += f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>'
        for x, y in (at.split(",") for at in places if len(places) <= DOTS):
            drawn += f'<circle cx="{x}" cy="{y}" r="2" fill="{color}"/>'
        if len(lines) > 1:
            legend += f' <span style="color:{color}">— {html.escape(name)}</span>'
    return (
        f"<figure><figcaption>{html.escape(title)}{legend}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">'
        f'<text x="0" y="25">{high:.4g}</text><text x="0" y="{height - 22}">{low:.4g}</text>'
        f'<text x="50" y="{height - 5}">step {first:g}</text>'
        f'<text x="{width}" y="{height - 5}" text-anchor="end">{last:g}</text>'
        f"{drawn}</svg></figure>"
    )


def read_series(workdir: Path) -> dict[str, Points]:
    """(step, value) of every metric of a run, by "kind/name"; values that are not finite are left
    out."""
    series: dict[str, Points] = {}
    for line in read_metrics(workdir):
        for name, value in line.items():
            if name not in ("step", "kind") and math.isfinite(value):
                series.setdefault(f"{line['kind']}/{name}", []).append((line["step"], value))
    return series


def is_detail(metric: str) -> bool:
    """Whether a metric is the standard error of another one, or its part at one timestep."""
    return metric.endswith(ERROR) or "loss_at_" in metric


def write_comparison(runs: dict[str, Path], path: Path) -> None:
    """Writes a page with the final metrics of runs, by name, and their curves in one plot each."""
    series = {name: read_series(workdir) for name, workdir in runs.items()}
    metrics = list(dict.fromkeys(m for found in series.values() for m in found if not is_detail(m)))
    header = "".join(f"<th>{html.escape(metric)}</th>" for metric in metrics)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{_final(found, m)}</td>" if m in found else "<td>" for m in metrics)
        + "</tr>"
        for name, found in series.items()
    )
    curves = ""
    for metric in metrics:
        lines = {name: found[metric] for name, found in series.items() if metric in found}
        errors = {
            n: found[metric + ERROR] for n, found in series.items() if metric + ERROR in found
        }
        curves += curve(lines, metric, errors) if max(map(len, lines.values())) > 1 else ""
    path.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><title>Runs</title>"
        f"<style>{STYLE}</style><h1>Runs</h1><table><tr><th>run</th>{header}</tr>{rows}</table>"
        f"<h2>Curves</h2>{curves}</html>"
    )


def _final(series: dict[str, Points], metric: str) -> str:
    """The last value, with its standard error if there is one."""
    error = series.get(metric + ERROR)
    return f"{series[metric][-1][1]:.5g}" + (f" ± {error[-1][1]:.2g}" if error else "")


def compare(workdirs: list[str], path: str) -> None:
    """Writes the page `path`. Raises ValueError for a directory without metrics."""
    for workdir in workdirs:
        if not read_series(Path(workdir)):
            raise ValueError(f"{workdir} has no metrics.jsonl with metrics: it is not a run")
    write_comparison({workdir: Path(workdir) for workdir in workdirs}, Path(path))


def write_report(workdir: Path, shown: int = 6) -> Path:
    """Writes `workdir/report.html` from the metrics, previews and config found there.

    In this order: at most `shown` of the previews, which are drawn at equal seeds, evenly spaced,
    the newest first; the loss in training and on held-out data in one plot; the curves of other
    metrics reported more than once, with bands of ± their standard error; the final values; the
    settings; and the curves of training itself.
    """
    series = read_series(workdir)
    previews = sorted((workdir / "previews").glob("*.png"))
    stride = max(-(-len(previews) // shown), 1)
    pictures = "".join(
        f"<figure><figcaption>step {int(path.stem)}</figcaption>"
        f'<img alt="preview at step {int(path.stem)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"></figure>'
        for path in previews[::-1][::stride]
    )
    losses = {name: series[name] for name in ("train/loss", "held_out/loss") if name in series}
    measured, training = [], []
    for title, names in _plots([name for name in series if name not in losses]).items():
        lines = {name: series[name] for name in names}
        if max(map(len, lines.values())) > 1:
            plot = curve(lines, title, _errors(series, names))
            (training if title.startswith("train/") else measured).append(plot)
    final = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{_final(series, name)}</td></tr>"
        for name in series
        if not name.endswith(ERROR)
    )
    config = json.loads((workdir / "config.json").read_text())
    parts = {
        "Pictures at equal seeds": pictures,
        "Loss": curve(losses, "loss", _errors(series, losses)) if losses else "",
        "Held-out data and drawn pictures": "".join(measured),
        "Final metrics": f"<table>{final}</table>" if final else "",
        "Settings": f"<table>{_settings(config)}</table><details><summary>All settings</summary>"
        f"<pre>{html.escape(json.dumps(config, indent=2))}</pre></details>",
        "Training": "".join(training),
    }
    body = "".join(f"<h2>{title}</h2>{text}" for title, text in parts.items() if text)
    name = html.escape(workdir.name)
    path = workdir / "report.html"
    path.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title>"
        f"<style>{STYLE}</style><h1>{name}</h1>{body}</html>"
    )
    return path


def _plots(names: list[str]) -> dict[str, list[str]]:
    """The metrics of each plot, by its title: the loss at all timesteps in one, and what drawn
    pictures reach beside what real ones do. Standard errors are bands of other plots."""
    plots: dict[str, list[str]] = {}
    for name in names:
        kind, _, metric = name.partition("/")
        title = f"{kind}/loss_at_" if metric.startswith("loss_at_") else name.replace("/real_", "/")
        if not name.endswith(ERROR):
            plots.setdefault(title, []).append(name)
    return {title.replace("_at_", " at each timestep"): found for title, found in plots.items()}


def _errors(series: dict[str, Points], names: Iterable[str]) -> dict[str, Points]:
    return {name: series[name + ERROR] for name in names if name + ERROR in series}


def _settings(config: dict[str, Any]) -> str:
    """Rows of a table with the settings of `MAIN_SETTINGS` that a config has."""
    rows = ""
    for setting in MAIN_SETTINGS:
        value = config
        for key in setting.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value not in (None, "", []):
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows += f"<tr><td>{setting}</td><td>{html.escape(shown)}</td></tr>"
    return rows
