"""`report.html`: the curves, previews and config of a run, on one self-contained page."""

import base64
import html
import json
from pathlib import Path

from ldm_jax.runtime.logging import read_metrics

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff }
h1, h2 { font-weight: 600 } table { border-collapse: collapse }
td { padding: .15em 1.5em .15em 0 } td + td { font-variant-numeric: tabular-nums }
img { max-width: 100%; image-rendering: pixelated; border: 1px solid #ddd }
figure { margin: 1em 0 } figcaption { color: #777 } svg text { font-size: 11px; fill: #777 }
pre { background: #f6f6f6; padding: 1em; overflow: auto }
"""


def curve(
    points: list[tuple[float, float]], title: str, width: int = 860, height: int = 180
) -> str:
    """An SVG line through (step, value) points, with its extremes as labels."""
    xs, ys = zip(*points, strict=True)
    low, high = min(ys), max(ys)
    x_span, y_span = max(xs[-1] - xs[0], 1), (high - low) or 1.0
    line = " ".join(
        f"{50 + (x - xs[0]) / x_span * (width - 60):.1f},"
        f"{height - 25 - (y - low) / y_span * (height - 45):.1f}"
        for x, y in points
    )
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">'
        f'<text x="0" y="25">{high:.4g}</text><text x="0" y="{height - 22}">{low:.4g}</text>'
        f'<text x="50" y="{height - 5}">step {xs[0]:g}</text>'
        f'<text x="{width}" y="{height - 5}" text-anchor="end">{xs[-1]:g}</text>'
        f'<polyline points="{line}" fill="none" stroke="#17b" stroke-width="1.5"/></svg></figure>'
    )


def write_report(workdir: Path, shown: int = 6) -> Path:
    """Writes `workdir/report.html` from the metrics, previews and config found there.

    Curves of every metric reported more than once, the final values, and at most `shown` of the
    previews, evenly spaced, the newest first.
    """
    metrics = read_metrics(workdir)
    series: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name not in ("step", "kind"):
                series.setdefault(f"{line['kind']}/{name}", []).append((line["step"], value))
    final = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{points[-1][1]:.5g}</td></tr>"
        for name, points in series.items()
    )
    curves = "".join(curve(points, name) for name, points in series.items() if len(points) > 1)
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
