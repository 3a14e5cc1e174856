"""The loader's training pictures per second.

    python -m benchmarks.loader --workers=0,1,2 --source=folder

The benchmark makes the folder: 512-px JPEGs of noise with the spectrum of photographs, quality 90,
read at 256 px. It prints for each number of workers (0: two threads) images per second, and images
per second of processor time, the speed of one core without other work on the machine.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ldm_jax.data.loader import Loader
from ldm_jax.data.scenes import SceneSource
from ldm_jax.data.sources import EmojiSource, FolderSource, Source

PICTURES, SIDE = 200, 512


def write_photographs(folder: Path) -> None:
    """Pictures whose amplitude falls with frequency, as in photographs, channels correlated."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
    amplitude = 1 / np.maximum(frequency, 1 / SIDE)
    for i in range(PICTURES):
        noise = np.fft.rfft2(rng.standard_normal((4, SIDE, SIDE)))
        shared, *channels = np.fft.irfft2(amplitude * noise, (SIDE, SIDE))
        picture = np.stack([shared + 0.3 * channel for channel in channels], axis=-1)
        picture = np.clip(128 + 50 * picture / picture.std(), 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{i:04}.jpg", quality=90)


def cpu_seconds() -> float:
    """Processor time of this process and of its workers so far, where there is a /proc."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def measure(source: Source, workers: int, batch_size: int, seconds: float) -> None:
    begin = time.perf_counter()
    batches = Loader(source, batch_size, 0, workers=workers).iterate()
    next(batches)
    first = time.perf_counter() - begin
    for _ in range(4 * max(1, workers)):  # what was made while the other workers started
        next(batches)
    start, cpu, images = time.perf_counter(), cpu_seconds(), 0
    while (wall := time.perf_counter() - start) < seconds:
        next(batches)
        images += batch_size
    used = cpu_seconds() - cpu
    batches.close()
    print(
        f"workers={workers}: {images / wall:7.1f} images/s, {images / used:7.1f} a core, "
        f"first batch after {first:.1f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--source", default="folder", choices=["emoji", "scenes", "folder"])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.source == "folder":
            write_photographs(Path(folder))
            source = FolderSource(folder, "all", image_size=256)
        else:
            source = EmojiSource("all") if arguments.source == "emoji" else SceneSource()
        for workers in arguments.workers.split(","):
            measure(source, int(workers), arguments.batch_size, arguments.seconds)


if __name__ == "__main__":
    main()
