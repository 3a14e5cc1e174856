"""Metrics of a run: one JSON line per report in `metrics.jsonl`, and TensorBoard."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tensorboardX import SummaryWriter

from ldm_jax.runtime.mllog import mlperf_log


class MetricsLog:
    """Appends to `directory/metrics.jsonl`; lines after `start`, of a killed run, are dropped.

    If the run's config asks for it, it also writes `mlperf.log` (see `mllog`).

    Raises OSError, here and in `write`, with the path, if the file cannot be written.
    """

    def __init__(self, directory: Path, start: int = 0):
        self.path = Path(directory) / "metrics.jsonl"
        kept = [line for line in read_metrics(directory) if line["step"] <= start]
        # A new file replaces the old one, so that a full disk leaves the old one intact.
        partial = self.path.with_name("metrics.jsonl.partial")
        with self._named_errors():
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(partial, self.path)
            self._file = self.path.open("ab", buffering=0)
        self._board = SummaryWriter(str(Path(directory) / "tensorboard"), purge_step=start or None)
        self._mlperf = mlperf_log(Path(directory), start)

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """One report of `kind` ("train", "held_out", …) after `step` steps."""
        with self._named_errors():
            self._file.write((json.dumps({"step": step, "kind": kind, **values}) + "\n").encode())
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        if self._mlperf is not None:
            self._mlperf.write(step, kind, values)

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._mlperf is not None:
            self._mlperf.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error}") from error


def read_metrics(directory: Path) -> list[dict]:
    """All complete lines of a run's metrics.jsonl; lines that a crash truncated are left out."""
    path = Path(directory) / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    whole = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            report = json.loads(line)
            if isinstance(report, dict) and {"step", "kind"} <= report.keys():
                whole.append(report)
    return whole


@dataclasses.dataclass
class Clock:
    """The time since the last report, without pauses, and the share of it spent on data."""

    since: float = dataclasses.field(default_factory=time.perf_counter)
    waited: float = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count: a checkpoint, a preview, compiling."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time that counts as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def report(self, images: int) -> dict[str, float]:
        """Speed since the last report: `images_per_second`, and `data_wait`, a share in 0..1."""
        now = time.perf_counter()
        spent = max(now - self.since, 1e-9)
        values = {"images_per_second": images / spent, "data_wait": self.waited / spent}
        self.since, self.waited = now, 0.0
        return values
