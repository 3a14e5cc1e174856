"""Several sources as one."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np


class Mixture:
    """Sources in turn, so that each gives an equal share of the examples, whatever its length.

    Example i is of source i mod n. A pass shows each example of the longest source once; a shorter
    one is repeated, in a fixed random order. Labels are numbered through all sources, in order.

    Args:
      sources: two or more; see `ldm_jax.data.sources.Source`. If one is empty, so is the mixture.
    """

    def __init__(self, sources: Sequence[Any]):
        self._sources = tuple(sources)
        self.classes = tuple(name for source in self._sources for name in source.classes)
        self.left_out = dict(sum((Counter(s.left_out) for s in self._sources), Counter()))
        self.lost_captions = dict(sum((Counter(s.lost_captions) for s in self._sources), Counter()))
        self.endless = any(getattr(source, "endless", False) for source in self._sources)
        self._orders = [
            None
            if getattr(source, "endless", False)
            else np.random.default_rng(0).permutation(len(source))
            for source in self._sources
        ]
        counts = [len(source.classes) for source in self._sources]
        self._first_labels = np.cumsum([0, *counts[:-1]]).tolist()
        lengths = [len(source) for source in self._sources]
        self._length = len(lengths) * max(lengths) if all(lengths) else 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        which, place = self._at(index)
        return self._labelled(which, self._sources[which][place])

    def describe(self, index: int) -> dict[str, Any]:
        which, place = self._at(index)
        return self._labelled(which, self._sources[which].describe(place))

    def _at(self, index: int) -> tuple[int, int]:
        """The source and the place in it of an example."""
        index = range(len(self))[index]  # IndexError beyond the end, as iteration needs
        turn, which = divmod(index, len(self._sources))
        order, length = self._orders[which], len(self._sources[which])
        place = turn % length
        return which, place if order is None else int(order[place])

    def _labelled(self, which: int, example: dict[str, Any]) -> dict[str, Any]:
        return example | {"label": self._first_labels[which] + example["label"]}
