"""Compares runs: their final metrics, and their curves in one plot for each metric.

python -m ldm_jax.report runs/a runs/b --out=comparison.html
"""

import sys

from absl import app, flags

from ldm_jax.runtime.console import log_to_console
from ldm_jax.training.report import compare

OUT = flags.DEFINE_string("out", "comparison.html", "The page.")


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
