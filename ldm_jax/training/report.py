"""`report.html`: the curves, previews and config of a run, on one self-contained page."""

import base64
import html
import json
import math
from pathlib import Path

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

Points = list[tuple[float, float]]


def curve(lines: dict[str, Points], title: str, width: int = 860, height: int = 180) -> str:
    """SVG lines through (step, value) points, by name, with the extremes of all as labels."""
    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    low, high, first, last = min(ys), max(ys), min(xs), max(xs)
    x_span, y_span = max(last - first, 1), (high - low) or 1.0
    drawn, legend = "", ""
    for i, (name, points) in enumerate(lines.items()):
        color = COLORS[i % len(COLORS)]
        line = " ".join(
            f"{50 + (x - first) / x_span * (width - 60):.1f},"
            f"{height - 25 - (y - low) / y_span * (height - 45):.1f}"
            for x, y in points
        )
        drawn += f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>'
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


def write_comparison(runs: dict[str, Path], path: Path) -> None:
    """Writes a page with the final metrics of runs, by name, and their curves in one plot each."""
    series = {name: read_series(workdir) for name, workdir in runs.items()}
    metrics = list(dict.fromkeys(metric for found in series.values() for metric in found))
    header = "".join(f"<th>{html.escape(metric)}</th>" for metric in metrics)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{found[m][-1][1]:.5g}</td>" if m in found else "<td>" for m in metrics)
        + "</tr>"
        for name, found in series.items()
    )
    curves = ""
    for metric in metrics:
        lines = {name: found[metric] for name, found in series.items() if metric in found}
        curves += curve(lines, metric) if max(map(len, lines.values())) > 1 else ""
    path.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><title>Runs</title>"
        f"<style>{STYLE}</style><h1>Runs</h1><table><tr><th>run</th>{header}</tr>{rows}</table>"
        f"<h2>Curves</h2>{curves}</html>"
    )


def compare(workdirs: list[str], path: str) -> None:
    """Writes the page `path`. Raises ValueError for a directory without metrics."""
    for workdir in workdirs:
        if not read_series(Path(workdir)):
            raise ValueError(f"{workdir} has no metrics.jsonl with metrics: it is not a run")
    write_comparison({workdir: Path(workdir) for workdir in workdirs}, Path(path))


def write_report(workdir: Path, shown: int = 6) -> Path:
    """Writes `workdir/report.html` from the metrics, previews and config found there.

    Curves of every metric reported more than once, the final values, and at most `shown` of the
    previews, evenly spaced, the newest first.
    """
    series = read_series(workdir)
    final = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{points[-1][1]:.5g}</td></tr>"
        for name, points in series.items()
    )
    curves = "".join(
        curve({name: points}, name) for name, points in series.items() if len(points) > 1
    )
    previews = sorted((workdir / "previews").glob("*.png"))
    stride = max(-(-len(previews) // shown), 1)
    pictures = "".join(
        f"<figure><figcaption>step {int(path.stem)}</figcaption>"
        f'<img alt="preview at step {int(path.stem)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"></figure>'
        for path in previews[::-1][::stride]
    )
    config = json.dumps(json.loads((workdir / "config.json").read_text()), indent=2)
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<title>{html.escape(workdir.name)}</title><style>{STYLE}</style><h1>{html.escape(workdir.name)}</h1>"
        f"<h2>Final metrics</h2><table>{final}</table><h2>Pictures</h2>{pictures}"
        f"<h2>Curves</h2>{curves}<h2>Config</h2><pre>{html.escape(config)}</pre></html>"
    )
    path = workdir / "report.html"
    path.write_text(page)
    return path
