"""Sweeps: their settings, the table, the Pareto front and its plot."""

import numpy as np
import pytest

from ldm_jax.evaluation.curves import axes, best, pareto_plot, settings_of, table


def test_settings():
    assert settings_of(["guidance=1:3"]) == [{"guidance": g} for g in (1.0, 2.0, 3.0)]
    assert settings_of(["guidance=1:2:0.5"])[1] == {"guidance": 1.5}
    assert settings_of(["steps=10,50", "sampler=ddim,euler"]) == [
        {"steps": 10, "sampler": "ddim"},
        {"steps": 10, "sampler": "euler"},
        {"steps": 50, "sampler": "ddim"},
        {"steps": 50, "sampler": "euler"},
    ]


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["seed=1:3"], "expected NAME=VALUES with a name of guidance, steps, sampler"),
        (["guidance"], "expected NAME=VALUES"),
        (["guidance=a:b"], "'a:b' is neither a list a,b,c nor low:high"),
        (["guidance=8:1"], "'8:1' is neither"),
        (["guidance=1:8:0"], "'1:8:0' is neither"),
        (["sampler=1:3"], "'1:3' is neither"),
        (["guidance=1:2", "guidance=3"], "guidance is swept twice"),
        (["guidance=1:50", "steps=10,20,30"], "150 settings: 100 at most"),
        (["steps=1:1000"], "'1:1000' is neither"),
    ],
)
def test_bad_sweeps(sweeps, message):
    with pytest.raises(ValueError, match=message):
        settings_of(sweeps)


def results():
    points = [(1.0, 40.0, 0.2), (2.0, 30.0, 0.4), (3.0, 35.0, 0.3), (4.0, 50.0, 0.6)]
    return [
        {
            "setting": {"guidance": g},
            "metrics": {
                "psnr": 20.0,
                "fd": fd,
                "scene": scene,
                "intervals": {"fd": [fd - 2, fd + 2]},
                "protocol": {},
            },
        }
        for g, fd, scene in points
    ]


def test_table():
    lines = table(results()).splitlines()
    assert lines[0] == "| guidance | fd | scene |" and len(lines) == 6
    assert lines[2] == "| 1 | 40 (38 … 42) | 0.2 |"


def test_front():
    """Less FD and more agreement: 1 and 3 are worse than 2 in both."""
    points = np.array([[r["metrics"]["scene"], r["metrics"]["fd"]] for r in results()])
    assert best(points, (False, True)).tolist() == [False, True, False, True]
    assert best(np.ones((2, 2)), (False, True)).all()  # neither is better


def test_plot():
    assert axes(results()[0]["metrics"]) == ("scene", "fd")
    plot = pareto_plot(results())
    assert plot.shape == (640, 640, 3) and plot.dtype == np.uint8
    blue = (plot == (0x1F, 0x77, 0xB4)).all(axis=-1)
    assert blue.sum() > 200  # the front, and the points on it
    with pytest.raises(ValueError, match="a plot needs a metric of"):
        axes({"fd": 1.0, "protocol": {}})
