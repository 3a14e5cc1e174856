"""Batches as a pure function of (seed, step).

Global position `step * batch_size + row` counts examples since the start of training. It
determines the epoch (position // n) and the place in that epoch's permutation; each epoch shows
each example once, and a batch may span two epochs. The augmentation of an example is drawn from
(seed, position). So resuming needs only the step, and process p of n, which holds rows [p*b,
(p+1)*b) of the global batch, sees the same data as any other division.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np

from ldm_jax.data.sources import Source
from ldm_jax.data.transforms import compose

Batch = dict[str, Any]

# Keep the two uses of one seed apart.
_ORDER, _AUGMENT = 0, 1


class Loader:
    """Batches of `source`: see the module's docstring for what they depend on.

    Args:
      source: a random-access sequence of examples, see `sources`.
      batch_size: of the global batch, over all processes.
      seed: of order and augmentation, at least 0.
      augment: names from `transforms.TRANSFORMS`.
      shuffle: False gives every epoch the order of the source.
      process_index, process_count: which rows of the global batch to give.

    Raises:
      ValueError: an empty source, an unknown augmentation, or a batch that the processes cannot
        share evenly.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        augment: Sequence[str] = (),
        shuffle: bool = True,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not len(source):
            raise ValueError("the source is empty")
        self.source, self.seed, self.shuffle = source, seed, shuffle
        self.batch_size = batch_size
        self._rows = _rows(batch_size, process_index, process_count)
        self._augment = compose(augment) if augment else None

    def batch(self, step: int) -> Batch:
        """This process's b rows of global batch `step`.

        Returns:
          "image" uint8 (b, H, W, 3), "label" int32 (b,), "caption" list of b str, "index" int64
          (b,), the index in the source.
        """
        positions = [step * self.batch_size + row for row in self._rows]
        indices = [self._index(position) for position in positions]
        examples = [self._example(*both) for both in zip(indices, positions, strict=True)]
        return _collate(examples, indices)

    def iterate(self, start_step: int = 0, prefetch: int = 2) -> Iterator[tuple[int, Batch]]:
        """Yields (step, batch) from `start_step` on, without end.

        The next `prefetch` batches are made meanwhile, each in a thread of its own; closing the
        generator ends the threads.
        """
        pool = ThreadPoolExecutor(prefetch, thread_name_prefix="loader")
        try:
            pending = deque(pool.submit(self.batch, start_step + i) for i in range(prefetch))
            for step in count(start_step):
                batch = pending.popleft().result()
                pending.append(pool.submit(self.batch, step + prefetch))
                yield step, batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.source))
        if not self.shuffle:
            return offset
        return int(_permutation(len(self.source), self.seed, epoch)[offset])

    def _example(self, index: int, position: int) -> dict[str, Any]:
        example = self.source[index]
        if self._augment is None:
            return example
        return self._augment(example, np.random.default_rng((self.seed, _AUGMENT, position)))


def batches_once(
    source: Source, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """The whole source once and in order, for evaluation.

    The last batch is padded to the full size by repeating the last example, so that nothing
    recompiles; "valid" bool (b,) is False there. Otherwise as `Loader.batch`; every process gets
    the same number of batches.
    """
    rows = _rows(batch_size, process_index, process_count)
    for start in range(0, len(source), batch_size):
        positions = [start + row for row in rows]
        indices = [min(position, len(source) - 1) for position in positions]
        valid = np.array([position < len(source) for position in positions])
        yield _collate([source[i] for i in indices], indices) | {"valid": valid}


def _rows(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of the global batch that one process holds."""
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is not divisible by {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} of {process_count} processes")
    local = batch_size // process_count
    return range(process_index * local, (process_index + 1) * local)


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(size)


def _collate(examples: list[dict[str, Any]], indices: list[int]) -> Batch:
    return {
        "image": np.stack([example["image"] for example in examples]),
        "label": np.array([example["label"] for example in examples], np.int32),
        "caption": [example["caption"] for example in examples],
        "index": np.array(indices, np.int64),
    }
