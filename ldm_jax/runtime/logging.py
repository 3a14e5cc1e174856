"""Metrics of a run: one JSON line per report in `metrics.jsonl`, and TensorBoard."""

import json
from pathlib import Path

from tensorboardX import SummaryWriter


class MetricsLog:
    """Appends to `directory/metrics.jsonl`; lines past `start`, of a run that died, are dropped."""

    def __init__(self, directory: Path, start: int = 0):
        self.path = Path(directory) / "metrics.jsonl"
        kept = [line for line in read_metrics(directory) if line["step"] <= start]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(Path(directory) / "tensorboard"), purge_step=start or None)

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """One report of `kind` ("train", "held_out", …) after `step` steps."""
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(directory: Path) -> list[dict]:
    """All lines of a run's metrics.jsonl; a last line that a crash cut short is left out."""
    path = Path(directory) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    whole = []
    for line in lines:
        try:
            whole.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return whole
