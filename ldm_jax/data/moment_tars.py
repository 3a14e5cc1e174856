"""Moments in tars, as MLPerf's Stable Diffusion benchmark has them (mlcommons/training,
`stable_diffusion`): webdataset samples with `KEY.npy`, the posterior's mean and log-variance,
(2c, h, w), and `KEY.txt`, the caption. They are taken as they are.

The first start finds out where in the tars the members lie, so that a sample is read alone; the
index is stored between starts.
"""

import glob
import io
import json
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm_jax.data.latent_shards import Stored
from ldm_jax.data.splits import check_split, in_split, is_held_out
from ldm_jax.data.tars import groups
from ldm_jax.data.text_files import printable
from ldm_jax.data.whole_files import publish

THREADS = 8  # tars that are looked through at once: over a network, each waits for its disk
NO_MOMENTS = "no moments"
COLUMNS = {
    "tar": np.int32,
    "start": np.int64,
    "bytes": np.int32,
    "text": np.int64,
    "long": np.int32,
}


def find_tars(pattern: str | Path) -> list[str]:
    """The tars in a folder, of a pattern with `*`, or the one of this name; sorted."""
    pattern = os.path.abspath(os.path.expanduser(pattern))
    found = glob.glob(
        os.path.join(glob.escape(pattern), "*.tar") if os.path.isdir(pattern) else pattern
    )
    return sorted(path for path in found if path.endswith(".tar") and os.path.isfile(path))


class TarMoments:
    """The samples of `tars`: each `describe`s its caption, and has `moments`, float32 (h, w, 2c).

    Args:
      tars: paths.
      shape: (h, w, 2c), that of the moments.
      split: "train", "held_out" or "all".
      held_out: the fraction to hold out, 0 to 1, by the hash of a sample's name.
      index: the file that stores where the samples are; None: no file.

    Raises:
      ValueError: a tar is damaged, holds no moments, or they have another shape; names it.
    """

    latents = True
    on_disk = True  # captions too, so that only the first are looked at
    states: dict[str, Any] = {}

    def __init__(
        self,
        tars: Sequence[str],
        shape: tuple[int, int, int],
        split: str = "train",
        held_out: float = 0.0,
        index: str | Path | None = None,
    ):
        check_split(split)
        self._tars, self._shape = list(tars), tuple(shape)
        self._columns, names, without = _find(self._tars, index)
        out = [held_out > 0 and is_held_out(name, held_out) for name in names]
        if all(out):
            out = [False] * len(out)
        kept = [i for i, gone in enumerate(out) if in_split(gone, split)]
        self._columns = {name: column[kept] for name, column in self._columns.items()}
        self._names = np.array([name.encode() for name in names])[kept]
        self.classes = ("",)
        self.left_out = {NO_MOMENTS: without} if without else {}
        self.lost_captions: dict[str, int] = {}
        if kept:
            self._moments(0)

    def __len__(self) -> int:
        return len(self._names)

    def describe(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        text = self._read(index, "text", "long") if self._columns["long"][index] >= 0 else b""
        caption = text.decode("utf-8-sig", errors="replace").strip()
        return {"caption": caption, "label": 0, "name": self._name(index)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        return self.describe(index) | {"moments": Stored(lambda: self._moments(index))}

    def _name(self, index: int) -> str:
        return self._names[index].decode()

    def _read(self, index: int, start: str, length: str) -> bytes:
        path = self._tars[self._columns["tar"][index]]
        count = int(self._columns[length][index])
        with open(path, "rb") as file:
            content = os.pread(file.fileno(), count, int(self._columns[start][index]))
        if len(content) < count:
            raise ValueError(f"{printable(path)} has become shorter: {self._name(index)} is cut")
        return content

    def _moments(self, index: int) -> np.ndarray:
        content = io.BytesIO(self._read(index, "start", "bytes"))
        try:
            array = np.lib.format.read_array(content, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{self._name(index)}.npy is no array of numbers: {error}") from error
        height, width, channels = self._shape
        if array.ndim == 4 and len(array) == 1:
            array = array[0]
        if array.shape != (channels, height, width):
            raise ValueError(
                f"{self._name(index)}.npy has the shape {array.shape}, and the moments of this "
                f"autoencoder at this data.image_size are {(channels, height, width)}"
            )
        return np.ascontiguousarray(array.transpose(1, 2, 0), np.float32)


def _find(
    tars: list[str], index: str | Path | None
) -> tuple[dict[str, np.ndarray], list[str], int]:
    """(columns, names, number of samples without moments), from the index or from the tars."""
    facts = [[path, (stat := os.stat(path)).st_size, stat.st_mtime_ns] for path in tars]
    facts = json.dumps(facts)
    if index is not None and os.path.exists(index):
        try:
            with np.load(index) as file:
                if str(file["tars"]) == facts:
                    names = (
                        file["names"].tobytes().decode().split("\n") if file["names"].size else []
                    )
                    return {c: file[c] for c in COLUMNS}, names, int(file["without"])
        except (OSError, ValueError, KeyError):
            pass  # it is made anew
    tables, names, without = [], [], 0
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(_look_through, tars)
        for number, path in enumerate(tqdm(tars, "Looking for moments", unit=" tars", delay=1)):
            keys, places, lacking = next(found)
            without += lacking
            tables.append(np.insert(places, 0, number, axis=1))
            names += [f"{os.path.basename(path)}/{key}" for key in keys]
    table = np.concatenate(tables)
    columns = {name: table[:, i].astype(dtype) for i, (name, dtype) in enumerate(COLUMNS.items())}
    if index is not None:
        part = Path(f"{index}.part")
        with part.open("wb") as file:
            joined = np.frombuffer("\n".join(names).encode(), np.uint8)
            np.savez(file, tars=facts, names=joined, without=without, **columns)
        publish(part, Path(index))
    return columns, names, without


def _look_through(path: str) -> tuple[list[str], np.ndarray, int]:
    """The samples of a tar: their keys; place and length of moments and caption, int64 (N, 4); and
    how many others have no moments.

    Raises:
      ValueError: it is damaged, or no sample has moments.
    """
    keys, places, without = [], [], 0
    try:
        with tarfile.open(path, "r:") as tar:
            for key, parts in groups(tar):
                tar.members = []  # it keeps all that it has seen
                if "npy" not in parts:
                    without += 1
                    continue
                array, text = parts["npy"], parts.get("txt")
                caption = (0, -1) if text is None else (text.offset_data, text.size)
                keys.append(printable(key))
                places.append((array.offset_data, array.size, *caption))
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{printable(path)} is damaged or truncated ({error}): get it again"
        ) from error
    if not keys:
        raise ValueError(f"{printable(path)} holds no moments: none of its members is a .npy")
    return keys, np.array(places, np.int64), without
