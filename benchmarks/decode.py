"""The speed of reading the pictures of a folder, and of opening the folder.

    python -m benchmarks.decode
    python -m benchmarks.decode --open=100000

The first prints images/s on one core for synthetic photographs (JPEG, quality 90), each decoded
whole and then shrunk, and through `read_fitted`, by turns. The second opens a folder of so many
pictures three times, with a caption beside each: without an index, with one, and for another split.
"""

import argparse
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ldm_jax.data.folder import FolderSource
from ldm_jax.data.images import fit, read_fitted, read_image
from tests.data.test_images import photograph

SIZES = ((512, 512, 256), (640, 480, 256), (768, 512, 256), (1024, 1024, 256), (3000, 2000, 512))
SECONDS = 2.0


def rate(read: Callable[[], object]) -> float:
    """Calls a second."""
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        read()
        count += 1
    return count / (time.perf_counter() - start)


def decoding(folder: Path) -> None:
    print("JPEG          square   whole      read_fitted   ratio")
    for width, height, size in SIZES:
        path = folder / "picture.jpg"
        Image.fromarray(photograph(width, height)).save(path, quality=90)
        whole = rate(lambda path=path, size=size: fit(read_image(path), (size, size)))
        fast = rate(lambda path=path, size=size: read_fitted(path, (size, size)))
        file = f"{width} x {height}"
        print(f"{file:12}  {size:4}   {whole:6.0f}/s   {fast:8.0f}/s   {fast / whole:8.1f}")


def opening(folder: Path, count: int) -> None:
    root, index = folder / "pictures", folder / "index.json"
    root.mkdir()
    Image.fromarray(photograph(512, 512)).save(folder / "picture.jpg", quality=90)
    (folder / "caption.txt").write_text("a photograph of something")
    originals = {file: folder / file for file in ("picture.jpg", "caption.txt")}
    for i in range(count):
        for file in originals:
            name = root / f"{i}{Path(file).suffix}"
            if i % 10_000:  # hard links spare the disk, and a file can have some 65,000
                os.link(originals[file], name)
            else:
                shutil.copy(originals[file], name)
                originals[file] = name
    for what, split in (("first", "train"), ("another split", "held_out"), ("again", "train")):
        start = time.perf_counter()
        source = FolderSource(root, split, index=index)
        opened = time.perf_counter() - start
        start = time.perf_counter()
        captions = {source.describe(i)["caption"] for i in range(len(source))}
        described = time.perf_counter() - start
        print(
            f"{what}: {count} pictures opened in {opened:.1f} s; {len(source)} described in "
            f"{described:.2f} s, {len(captions)} captions"
        )
    print(f"index: {index.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--open", type=int, default=0)
    count = parser.parse_args().open
    logging.basicConfig()
    with tempfile.TemporaryDirectory() as folder:
        if count:
            opening(Path(folder), count)
        else:
            decoding(Path(folder))


if __name__ == "__main__":
    main()
