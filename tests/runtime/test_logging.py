"""Metrics survive crashes and full disks, and the clock counts correctly."""

import errno
import json
import os

import pytest

from ldm_jax.runtime import logging as module
from ldm_jax.runtime.logging import Clock, MetricsLog, read_metrics


def lines(*steps):
    return [{"step": step, "kind": "train", "loss": 1.0 / step} for step in steps]


def written(directory, *steps):
    log = MetricsLog(directory)
    for line in lines(*steps):
        log.write(line["step"], "train", {"loss": line["loss"]})
    log.close()
    return directory / "metrics.jsonl"


def test_lines_past_the_start_are_dropped(tmp_path):
    written(tmp_path, 5, 10, 15)
    MetricsLog(tmp_path, start=10).close()
    assert read_metrics(tmp_path) == lines(5, 10)


@pytest.mark.parametrize(
    "bad", [b'{"step": 7, "ki', b"\xff\xfe\x00", b"", b"[1, 2]", b'{"loss": 1}', b"null"]
)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_damaged_line_costs_no_other(tmp_path, bad, place):
    path = written(tmp_path, 1, 2, 3)
    whole = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*whole[:place], bad, *whole[place:]]))
    assert read_metrics(tmp_path) == lines(1, 2, 3)
    log = MetricsLog(tmp_path, start=3)
    log.write(4, "train", {"loss": 0.25})
    log.close()
    assert read_metrics(tmp_path) == lines(1, 2, 3, 4)


def test_a_full_disk_at_start_leaves_the_metrics(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = written(tmp_path, 1, 2)
    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(OSError, match=f"cannot write {path}: .*No space"):
        MetricsLog(tmp_path, start=1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines(1, 2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_named(tmp_path):
    path = written(tmp_path, 1)
    log = MetricsLog(tmp_path, start=1)
    log._file.close()
    log._file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb", buffering=0)
    with pytest.raises(OSError, match=f"cannot write {path}: .*No space"):
        log.write(2, "train", {"loss": 0.5})
    log.close()
    assert read_metrics(tmp_path) == lines(1)


def test_the_clock_leaves_out_pauses_and_counts_waiting(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    clock = Clock(since=now[0])
    spend(3)
    with clock.paused():
        spend(50)
    with clock.waiting():
        spend(1)
    assert clock.report(80) == pytest.approx({"images_per_second": 20.0, "data_wait": 0.25})
    spend(2)
    assert clock.report(10) == pytest.approx({"images_per_second": 5.0, "data_wait": 0.0})


def test_mlperf_s_lines(tmp_path):
    """They are in the form of its logs, and go on when a run resumes."""
    train = {"batch_size": 4, "steps": 20, "mllog": True}
    optimizer = {"name": "adamw", "lr": 1e-3, "warmup": 5, "b1": 0.9, "b2": 0.99}
    config = {"seed": 7, "train": train, "optimizer": optimizer | {"weight_decay": 0.01}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for start in (0, 10):
        log = MetricsLog(tmp_path, start=start)
        log.write(start + 10, "train", {"loss": 0.5, "images_per_second": 8.0})
        log.write(start + 10, "distance", {"fd": 90.0})
        log.close()
    marks, lines = zip(
        *(line.split(" ", 1) for line in (tmp_path / "mlperf.log").read_text().splitlines()),
        strict=True,
    )
    events = [json.loads(line) for line in lines]
    assert set(marks) == {":::MLLOG"}
    fields = ["namespace", "time_ms", "event_type", "key", "value", "metadata"]
    assert all(list(event) == fields for event in events)
    times = [event["time_ms"] for event in events]
    assert times == sorted(times)
    found = [(event["key"], event["value"]) for event in events]
    assert ("global_batch_size", 4) in found and ("opt_adamw_beta_2", 0.99) in found
    run = [key for key, _ in found[found.index(("run_start", None)) :]]
    assert run == ["run_start", *2 * ["loss", "tracked_stats", "eval_accuracy", "run_stop"]]
    ends = [event["metadata"] for event in events if event["key"] == "run_stop"]
    assert ends == [
        {"samples_count": 40, "status": "aborted"},
        {"samples_count": 80, "status": "success"},
    ]
    accuracy = next(event for event in events if event["key"] == "eval_accuracy")
    assert accuracy["metadata"] == {"samples_count": 40, "metric": "distance/fd"}


def test_no_mlperf_log_unasked(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"train": {"steps": 1}}))
    MetricsLog(tmp_path).close()
    assert not (tmp_path / "mlperf.log").exists()
