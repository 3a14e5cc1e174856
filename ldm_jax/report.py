"""Compares runs: their final metrics, and their curves in one plot for each metric.

python -m ldm_jax.report runs/a runs/b --out=comparison.html
"""

import sys
from pathlib import Path

from absl import app, flags

from ldm_jax.runtime.console import log_to_console

OUT = flags.DEFINE_string("out", "comparison.html", "The page.")


def compare(workdirs: list[str], out: str) -> None:
    """Writes the page `out`. Raises ValueError for a directory without metrics."""
    from ldm_jax.training.report import read_series, write_comparison

    for workdir in workdirs:
        if not read_series(Path(workdir)):
            raise ValueError(f"{workdir} has no metrics.jsonl with metrics: it is not a run")
    write_comparison({workdir: Path(workdir) for workdir in workdirs}, Path(out))


def main(argv: list[str]) -> None:
    log_to_console()
    if len(argv) < 2:
        sys.exit("error: name the runs to compare: python -m ldm_jax.report runs/a runs/b")
    try:
        compare(argv[1:], OUT.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"Comparison: {OUT.value}")


if __name__ == "__main__":
    app.run(main)
