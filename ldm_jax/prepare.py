"""Prepares a data set for training: filters it, resizes the pictures once, and writes shards.

    python -m ldm_jax.prepare --source=PATH --out=DIR --image_size=512 --workers=16

PATH is a folder of pictures with captions, a folder of webdataset's tars or of parquet files with
pictures in them, or one such file. Train with `data.source=shards`, `data.path=DIR`. If it is
stopped, the same command goes on where it was.
"""

import os
from typing import Any

from absl import flags

from ldm_jax.data.filters import Options
from ldm_jax.data.preparation import prepare
from ldm_jax.data.shards import ENCODINGS
from ldm_jax.runtime.console import run

SOURCE = flags.DEFINE_string("source", None, "The data set: a folder or a file.", required=True)
OUT = flags.DEFINE_string("out", None, "The folder of the shards, new or empty.", required=True)
WORKERS = flags.DEFINE_integer(
    "workers", len(os.sched_getaffinity(0)), "Number of processes.", lower_bound=0
)
flags.DEFINE_integer("image_size", None, "Side of the squares, pixels.", 1, required=True)
flags.DEFINE_integer(
    "min_size", 0, "Smallest short side of a file, pixels; 0: half of image_size.", 0
)
flags.DEFINE_float("max_watermark", None, "Largest pwatermark; unset: no filter.")
flags.DEFINE_float("max_unsafe", None, "Largest punsafe; unset: no filter.")
flags.DEFINE_float("min_aesthetic", None, "Lowest aesthetic score; unset: no filter.")
flags.DEFINE_enum(
    "encoding",
    "webp",
    list(ENCODINGS),
    "Of the pictures; webp and png are lossless, jpeg (quality 95) is 2 to 3 times smaller.",
)
flags.DEFINE_integer("shard_size", 1000, "Number of pictures in a shard.", 1)
flags.DEFINE_enum("kind", "auto", ["auto", "folder", "tar", "parquet"], "What the source is.")
flags.DEFINE_string("image_column", "", "Column of the pictures; empty: found by its type.")
flags.DEFINE_string("caption_column", "", "Column or key of the captions; empty: text or caption.")
flags.DEFINE_string("label_column", "", "Column or key of the class; empty: label or class.")


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    size = f"{report['shards']:,} shards, {report['bytes'] / 1e6:,.1f} MB"
    lines = [f"{report['read']:>9,} read", f"{report['kept']:>9,} kept: {size}"]
    for reason, dropped in report["dropped"].items():
        names = ", ".join(dropped["first"]) + ", …" * (dropped["count"] > len(dropped["first"]))
        lines.append(f"{dropped['count']:>9,} dropped, {reason}: {names}")
    for reason, count in report["lost_captions"].items():
        lines.append(f"{count:>9,} captions lost: {reason}")
    return "\n".join(lines)


def main():
    given = {name: flags.FLAGS[name].value for name in Options.__dataclass_fields__}
    print(table(prepare(SOURCE.value, OUT.value, Options(**given), WORKERS.value)))
    print(f"Train with --config.data.source=shards --config.data.path={OUT.value}")


if __name__ == "__main__":
    run(main)
