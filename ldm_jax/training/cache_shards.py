"""Writes a shard of a cache: see `data/latent_shards.py` and `caching.py`."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from ldm_jax.data.latent_shards import LatentContents
from ldm_jax.data.shards import contents_path, shard_path
from ldm_jax.data.text_files import printable
from ldm_jax.data.whole_files import publish, write_whole
from ldm_jax.training.text_states import FIELDS, CachedStates


class Shard:
    """A shard that is being written."""

    def __init__(self, folder: Path, number: int, dtype: str):
        self._folder, self._number, self._dtype = folder, number, np.dtype(dtype)
        self._part = shard_path(folder, number).with_suffix(".array_record.part")
        # Groups of one: random access. Moments hardly compress.
        self._writer = ArrayRecordWriter(str(self._part), "group_size:1,uncompressed")
        self._records, self._errors = 0, defaultdict(lambda: np.zeros(2))
        self.names: list[str] = []
        self._captions: list[str] = []
        self._labels: list[int] = []
        self._placements: list[list[int]] = []

    def add(self, batch: dict[str, Any], arrays: Sequence[np.ndarray]) -> None:
        """Adds examples with their moments, and those of their mirror images."""
        for i, name in enumerate(batch["name"]):
            for array in arrays:
                self._write("moments", array[i], name)
        self.names += [printable(name) for name in batch["name"]]
        self._captions += batch["caption"]
        self._labels += batch["label"].tolist()
        if batch["placed"].any():
            self._placements += batch["placed"].tolist()

    def finish(self, texts: Sequence[CachedStates]) -> None:
        """Adds the states of the captions, and gives the files their names."""
        distinct, states = list(dict.fromkeys(self._captions)), []
        if texts:
            encoded = [text.encoded(distinct) for text in texts]
            for caption, *parts in zip(distinct, *encoded, strict=True):
                arrays = [a for part in parts for a in text_arrays(part).values()]
                whole = np.concatenate([np.asarray(a, np.float32).ravel() for a in arrays])
                self._write("states", whole, f"the caption {caption!r}")
            places = {caption: place for place, caption in enumerate(distinct)}
            states = [places[caption] for caption in self._captions]
        self._writer.close()
        errors = {name: tuple(sums.tolist()) for name, sums in self._errors.items()}
        lists = self.names, self._captions, self._labels, states, self._placements
        size = self._part.stat().st_size
        contents = LatentContents(size, self._records, *lists, errors)
        write_whole(contents_path(self._folder, self._number), contents._asdict())
        publish(self._part, shard_path(self._folder, self._number))

    def _write(self, kind: str, array: np.ndarray, name: str) -> None:
        with np.errstate(over="ignore"):
            stored = array.astype(self._dtype)
        back = stored.astype(np.float32)
        if not np.isfinite(back).all():
            raise ValueError(
                f"{kind} of {printable(name)}: {np.abs(array).max():.4g} is beyond {self._dtype}; "
                "use --dtype=float32 or bfloat16"
            )
        if self._dtype != np.float32:
            sums = [np.square(x, dtype=np.float64).sum() for x in (back - array, array)]
            self._errors[kind] += sums
        self._writer.write(stored.tobytes())
        self._records += 1


def text_arrays(states: Any) -> dict[str, np.ndarray]:
    """The fields of a `Conditioning` that a text encoder fills."""
    return {f: np.asarray(v) for f in FIELDS if (v := getattr(states, f)) is not None}
