"""Aspect-ratio buckets: a batch holds pictures of one of a few shapes, and little is cropped."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ldm_jax.data.images import Shape

# Height to width, as cameras and screens have it. Each shape compiles a training step of its own.
ASPECTS = (9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9)


def bucket_shapes(image_size: int) -> tuple[Shape, ...]:
    """At most seven shapes (height, width) of about `image_size`² pixels, tall ones last.

    Sides are multiples of a power of two, 8 … 64, at most an eighth of `image_size`.
    """
    multiple = 8
    while multiple < 64 and 16 * multiple <= image_size:
        multiple *= 2

    def side(share: float) -> int:
        return max(1, round(image_size * share**0.5 / multiple)) * multiple

    return tuple(dict.fromkeys((side(aspect), side(1 / aspect)) for aspect in ASPECTS))


def nearest_bucket(shape: Shape, shapes: Sequence[Shape]) -> int:
    """The index of the shape whose aspect ratio is nearest to that of `shape`."""
    aspects = np.log([height / width for height, width in (shape, *shapes)])
    return int(np.argmin(np.abs(aspects[1:] - aspects[0])))


@lru_cache(maxsize=32)
def permutation(size: int, *seed: int) -> np.ndarray:
    """0 … size − 1 in the random order of a seed."""
    return np.random.default_rng(seed).permutation(size)


class Grouped:
    """The examples of each batch, where those of a batch are of one group.

    Before epoch e, a group of n examples has given ⌊e·n / batch_size⌋ batches: in the long run all
    examples are shown equally often. The batches of an epoch are in a random order, and a group
    shows its examples in another random order each time. All depends on (seed, step) alone.

    Args:
      groups: int (N,), the group of each example.
      batch_size: of the global batch.
      seed: of the order, integers of at least 0.
    """

    def __init__(self, groups: np.ndarray, batch_size: int, seed: tuple[int, ...]):
        self._members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
        self._counts = np.array([len(members) for members in self._members], np.int64)
        self._batch_size, self._seed = batch_size, seed

    def indices(self, step: int, rows: Sequence[int]) -> list[int]:
        """The examples in `rows` of batch `step`."""
        which, turn = self._at(step)
        members, indices = self._members[which], []
        for row in rows:
            repeat, place = divmod(turn * self._batch_size + row, len(members))
            order = permutation(len(members), *self._seed, which, repeat)
            indices.append(int(members[order[place]]))
        return indices

    def _at(self, step: int) -> tuple[int, int]:
        """The group of a batch, and how many batches of the group come before it."""
        epoch = step * self._batch_size // int(self._counts.sum())
        while self._before(epoch).sum() > step:
            epoch -= 1
        while self._before(epoch + 1).sum() <= step:
            epoch += 1
        before = self._before(epoch)
        batches = np.repeat(np.arange(len(before)), self._before(epoch + 1) - before)
        batches = batches[permutation(len(batches), *self._seed, len(before), epoch)]
        *earlier, which = batches[: step - before.sum() + 1].tolist()
        return which, int(before[which]) + earlier.count(which)

    def _before(self, epoch: int) -> np.ndarray:
        """How many batches each group has given before an epoch."""
        return epoch * self._counts // self._batch_size
