"""The log of a run in MLPerf's format, lines of `:::MLLOG {…}` in `mlperf.log`, with the events of
MLPerf Training's reference of Stable Diffusion: mlcommons/training, mlperf_logging_utils.py.

`train.mllog` asks for it. What only a submitter knows (division, organisation, platform), the times
of evaluations and the end of the initialisation are not in it.
"""

import json
import time
from pathlib import Path
from typing import Any

POINT, START, END = "POINT_IN_TIME", "INTERVAL_START", "INTERVAL_END"


class MLPerfLog:
    """Appends to `directory/mlperf.log`; the run begins when a log of step 0 is opened."""

    def __init__(self, directory: Path, config: dict[str, Any], start: int = 0):
        self._batch, self._steps = config["train"]["batch_size"], config["train"]["steps"]
        self._step = start
        self._file = (directory / "mlperf.log").open("w" if start == 0 else "a", buffering=1)
        if start:
            return
        optimizer = config["optimizer"]
        self._event("seed", config["seed"])
        self._event("global_batch_size", self._batch)
        self._event("gradient_accumulation_steps", config["train"].get("accumulate", 1))
        self._event("opt_name", optimizer["name"])
        self._event("opt_base_learning_rate", optimizer["lr"])
        self._event("opt_learning_rate_warmup_steps", optimizer["warmup"])
        if optimizer["name"] == "adamw":
            self._event("opt_adamw_beta_1", optimizer["b1"])
            self._event("opt_adamw_beta_2", optimizer["b2"])
            self._event("opt_adamw_weight_decay", optimizer["weight_decay"])
        self._event("run_start", None, START)

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """A report of training, or the metrics of an evaluator, after `step` steps."""
        self._step = max(self._step, step)
        if kind != "train":
            for name, value in values.items():
                self._event("eval_accuracy", value, metric=f"{kind}/{name}")
            return
        self._event("loss", values["loss"])
        if "images_per_second" in values:
            self._event("tracked_stats", {"throughput": values["images_per_second"]})

    def close(self) -> None:
        """The end of the run: "success" after its last step, "aborted" before."""
        status = "success" if self._step >= self._steps else "aborted"
        self._event("run_stop", None, END, status=status)
        self._file.close()

    def _event(self, key: str, value: Any, kind: str = POINT, **metadata: Any) -> None:
        line = {
            "namespace": "",
            "time_ms": int(time.time() * 1000),
            "event_type": kind,
            "key": key,
            "value": value,
            "metadata": {"samples_count": self._step * self._batch} | metadata,
        }
        self._file.write(f":::MLLOG {json.dumps(line)}\n")


def mlperf_log(directory: Path, start: int = 0) -> MLPerfLog | None:
    """The log of the run in `directory`, if the `config.json` there asks for one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    asked = config.get("train", {}).get("mllog", False)
    return MLPerfLog(directory, config, start) if asked else None
