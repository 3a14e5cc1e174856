"""The report of a run: what a reader wants first comes first, and errors are bands."""

import json
import re

import numpy as np
import pytest

from ldm_jax.pictures import save_png
from ldm_jax.training.report import curve, write_comparison, write_report


@pytest.fixture
def run(tmp_path):
    """A run of 30 steps that left two previews."""
    workdir = tmp_path / "a&b"
    (workdir / "previews").mkdir(parents=True)
    for step in (15, 30):
        save_png(workdir / "previews" / f"{step:07d}.png", np.zeros((4, 4, 3), np.uint8))
    lines = []
    for step in (10, 20, 30):
        lines.append(dict(step=step, kind="train", loss=1.0, grad_norm=2.0, skipped=float("nan")))
        held_out = {"loss": 1.5, "loss_error": 0.25, "loss_at_0": 1.0, "loss_at_0.5": 2.0}
        lines.append(dict(step=step, kind="held_out", **held_out))
        lines.append(dict(step=step, kind="task", objects=0.5, real_objects=1.0))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = dict(task="diffusion", seed=3, sampling=dict(prompts=["<fox>"], labels=[]))
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


def figures(page):
    """{title: SVG} of a page."""
    return dict(re.findall(r'<svg[^>]*aria-label="([^"]*)">(.*?)</svg>', page))


def test_pictures_come_first_then_the_loss_and_the_settings(run):
    page = write_report(run).read_text()
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles == [
        "Pictures at equal seeds",
        "Loss",
        "Held-out data and drawn pictures",
        "Final metrics",
        "Settings",
        "Training",
    ]
    assert page.index("preview at step 30") < page.index("preview at step 15")
    assert "a&amp;b" in page
    assert "<td>sampling.prompts</td><td>[&quot;&lt;fox&gt;&quot;]</td>" in page
    assert "sampling.labels</td>" not in page
    assert "<td>held_out/loss</td><td>1.5 ± 0.25</td>" in page


def test_lines_that_belong_together_are_in_one_plot(run):
    drawn = figures(write_report(run).read_text())
    counts = {title: svg.count("<polyline") for title, svg in drawn.items()}
    assert counts == {
        "loss": 2,
        "held_out/loss at each timestep": 2,
        "task/objects": 2,
        "train/grad_norm": 1,
    }
    assert [title for title, svg in drawn.items() if "<polygon" in svg] == ["loss"]


def test_a_band_is_a_standard_error_above_and_below():
    """Of values 1 and 3, ± 1: the axis is 0 to 4, from y = 155 to 20."""
    svg = curve({"loss": [(0, 1.0), (10, 3.0)]}, "loss", {"loss": [(0, 1.0), (10, 1.0)]})
    assert '<polygon points="50.0,87.5 850.0,20.0 850.0,87.5 50.0,155.0"' in svg
    assert '<polyline points="50.0,121.2 850.0,53.8"' in svg
    assert '<text x="0" y="25">4</text><text x="0" y="158">0</text>' in svg


def test_a_run_without_anything_but_a_config_has_a_report(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(task="autoencoder")))
    page = write_report(tmp_path).read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["Settings"]


def test_a_comparison_shows_errors_with_their_metrics(run, tmp_path):
    write_comparison({"a": run, "b": run}, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    header = re.findall("<th>(.*?)</th>", page)
    assert header[1:4] == ["train/loss", "train/grad_norm", "held_out/loss"]
    assert not [name for name in header if "error" in name or "_at_" in name]
    assert page.count("<td>1.5 ± 0.25</td>") == 2 and page.count("<polygon") == 2
