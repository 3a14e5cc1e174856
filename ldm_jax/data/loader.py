"""Batches as a pure function of (seed, step).

Global position `step * batch_size + row` counts examples since the start of training. It
determines the epoch (position // n) and the place in that epoch's permutation; each epoch shows
each example once, and a batch may span two epochs. An endless source is not permuted; one with
`groups` has batches of one group (`buckets.Grouped`). The augmentation of an example is drawn from
(seed, position). So resuming needs only the step, and process p of n, which holds rows
[p*b, (p+1)*b) of the global batch, sees the same data as any other division. Worker processes make
whole batches, so their number changes nothing either.
"""

import atexit
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import util
from typing import Any

import grain
import numpy as np
from absl import flags

from ldm_jax.data.buckets import Grouped, permutation
from ldm_jax.data.sources import Source
from ldm_jax.data.transforms import Example, Transform

Batch = dict[str, Any]

# Iterators that may be open at exit, to be closed before the modules that they need are unloaded.
_OPEN: weakref.WeakSet[Iterator] = weakref.WeakSet()

ENTRIES = ("image", "label", "caption")

# Linux's directory of memory that processes share.
SHARED_MEMORY = "/dev/shm"

# Keep the two uses of one seed apart.
_ORDER, _AUGMENT = 0, 1


def example_rng(seed: int, position: int) -> np.random.Generator:
    """The random generator for the transform of the example at a global position."""
    return np.random.default_rng((seed, _AUGMENT, position))


class Loader:
    """Batches of `source`; the module's docstring says what determines them.

    Args:
      source: a random-access sequence of examples, see `sources`.
      batch_size: of the global batch, over all processes.
      seed: of order and augmentation, at least 0.
      transform: (example, rng) -> example, drawing from `rng` alone; None for none. Threads call
        it at the same time.
      entries: what of an example a batch holds.
      shuffle: False gives every epoch the order of the source; an endless one has it anyway.
      process_index, process_count: which rows of the global batch to give.
      workers: the number of processes that `iterate` makes batches in; 0 for threads of this one.
        Each is sent `source` and `transform`, which must pickle, and takes seconds to start.

    Raises:
      ValueError: an empty source, a negative number of workers, or a batch that the processes
        cannot share evenly.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        transform: Transform | None = None,
        entries: Sequence[str] = ENTRIES,
        shuffle: bool = True,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 0,
    ):
        if not len(source):
            raise ValueError("the source is empty")
        if workers < 0:
            raise ValueError(f"workers is {workers}; expected 0 (threads) or more")
        self.source, self.seed = source, seed
        self.shuffle = shuffle and not getattr(source, "endless", False)
        groups = getattr(source, "groups", None)
        self._grouped = None if groups is None else Grouped(groups, batch_size, (seed, _ORDER))
        self.batch_size, self.entries, self.workers = batch_size, tuple(entries), workers
        self._rows = _rows(batch_size, process_index, process_count)
        self._transform = transform

    def batch(self, step: int) -> Batch:
        """This process's b rows of global batch `step`.

        Returns:
          Each of `entries`: strings as a list of b str, numbers and arrays stacked, (b, ...).
          Python integers and 64-bit integers become int32, floats likewise float32; other arrays
          keep their type. "index" int64 (b,) is the index in the source.

        Raises:
          ValueError: an example lacks an entry, its entry is neither text nor numbers, or the
            entries of two examples differ in shape; names entry and examples.
        """
        positions = [step * self.batch_size + row for row in self._rows]
        if self._grouped is None:
            indices = [self._index(position) for position in positions]
        else:
            indices = self._grouped.indices(step, self._rows)
        examples = [
            _read(self.source, index, self._transform, self.seed, position)
            for index, position in zip(indices, positions, strict=True)
        ]
        return _collate(examples, indices, self.entries)

    def iterate(self, start_step: int = 0, prefetch: int = 2) -> Iterator[tuple[int, Batch]]:
        """Yields (step, batch) from `start_step` on, without end.

        At least the next `prefetch` batches are made in advance: each in a thread of its own, or in
        the `workers` processes, where up to four more per process may wait. Closing the generator
        ends processes at once, and threads after their current batches.

        Raises:
          Exception: the error of reading a batch, when that batch is due; if it cannot be pickled,
            a ValueError, OSError or RuntimeError with the same text.
          ChildProcessError: a worker was killed.
        """
        batches = self._iterate(start_step, prefetch)
        _OPEN.add(batches)
        return batches

    def _iterate(self, start_step: int, prefetch: int) -> Iterator[tuple[int, Batch]]:
        with closing(self._start(start_step, prefetch)) as results:
            for step in itertools.count(start_step):
                try:
                    result = next(results)
                except RuntimeError as error:
                    raise ChildProcessError(
                        "a process that reads pictures was killed, perhaps for lack of memory: "
                        f"try fewer than data.workers={self.workers}"
                    ) from error
                if self.workers:
                    result = pickle.loads(result)
                if result.error is not None:
                    raise _restored(result.error)
                yield step, result.batch

    def _start(self, start_step: int, prefetch: int) -> grain.DatasetIterator:
        # One element per step, so a later start is a later start of the range.
        results = grain.MapDataset.range(start_step, sys.maxsize).map(self._result)
        if not self.workers:
            return iter(results.to_iter_dataset(grain.ReadOptions(prefetch, prefetch)))
        if not flags.FLAGS.is_parsed():
            # grain reads flags when it starts a worker; without a command line, use their defaults.
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(
            self.workers, per_worker_buffer_size=max(1, -(-prefetch // self.workers))
        )
        sent = results.map(partial(_as_bytes, workers=self.workers))
        iterator = iter(sent.to_iter_dataset(grain.ReadOptions(0, 0)).mp_prefetch(options))
        # Reading the state creates the iterators of all workers, so that closing ends them.
        iterator.get_state()
        # The workers inherit the blocking of SIGINT and SIGTERM: a terminal sends Ctrl-C to all
        # processes, and this process decides how to stop. Not before the line above, which may
        # start the process that tracks shared memory, and that unblocks them.
        with _signals_blocked():
            iterator.start_prefetch()
        return iterator

    def _result(self, step: int) -> "_Result":
        try:
            return _Result(self.batch(step))
        except Exception as error:
            return _Result(error=_packed(error) if self.workers else error)

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.source))
        if not self.shuffle:
            return offset
        return int(permutation(len(self.source), self.seed, _ORDER, epoch)[offset])


@atexit.register
def _close_all() -> None:
    for batches in list(_OPEN):
        batches.close()


def batches_once(
    source: Source,
    batch_size: int,
    transform: Transform | None = None,
    entries: Sequence[str] = ENTRIES,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The whole source once and in order, for evaluation; nothing from an empty one.

    The last batch is padded to the full size by repeating the last example, so that nothing
    recompiles; "valid" bool (b,) is False there. Otherwise as `Loader.batch`, but the randomness of
    `transform` depends on (seed, index). Every process gets the same number of batches.
    """
    rows = _rows(batch_size, process_index, process_count)
    for start in range(0, len(source), batch_size):
        positions = [start + row for row in rows]
        indices = [min(position, len(source) - 1) for position in positions]
        valid = np.array([position < len(source) for position in positions])
        examples = [_read(source, index, transform, seed, index) for index in indices]
        yield _collate(examples, indices, entries) | {"valid": valid}


def _rows(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of the global batch of one process."""
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is not divisible by {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} of {process_count} processes")
    local = batch_size // process_count
    return range(process_index * local, (process_index + 1) * local)


def _read(
    source: Source, index: int, transform: Transform | None, seed: int, position: int
) -> Example:
    example = source[index]
    return example if transform is None else transform(example, example_rng(seed, position))


def _collate(examples: list[Example], indices: list[int], entries: Sequence[str]) -> Batch:
    names = [str(e.get("name", i)) for e, i in zip(examples, indices, strict=True)]
    for name, example in zip(names, examples, strict=True):
        for entry in entries:
            if entry not in example:
                known = ", ".join(sorted(example))
                raise ValueError(f"the example {name!r} has no entry {entry!r}; it has {known}")
    batch = {entry: _stack(entry, [e[entry] for e in examples], names) for entry in entries}
    return batch | {"index": np.array(indices, np.int64)}


def _stack(entry: str, values: list[Any], names: list[str]) -> np.ndarray | list[str]:
    """One entry of all examples, as in the batch."""
    if all(isinstance(value, str) for value in values):
        return values
    arrays = [_array(entry, value, name) for value, name in zip(values, names, strict=True)]
    for array, name in zip(arrays, names, strict=True):
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"the entry {entry!r} has the shape {arrays[0].shape} in {names[0]!r} and "
                f"{array.shape} in {name!r}; in one batch all must be alike"
            )
    stacked = np.stack(arrays)
    short = {"i": np.int32, "u": np.int32, "f": np.float32}.get(stacked.dtype.kind)
    if short is None or (stacked.ndim > 1 and stacked.dtype.itemsize < 8):
        return stacked
    shortened = stacked.astype(short)
    if short is np.int32 and (shortened != stacked).any():
        largest = max(stacked.min(), stacked.max(), key=abs)
        raise ValueError(f"the entry {entry!r} has the number {largest}, which int32 cannot hold")
    return shortened


def _array(entry: str, value: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError:  # lists of lists that differ in length
        array = np.empty((), object)
    if array.dtype.kind in "OSUMm":
        raise ValueError(
            f"the entry {entry!r} of {name!r} is of type {type(value).__name__}; all of a batch "
            "must be text, or all must be numbers or arrays of numbers"
        )
    return array


@dataclass(frozen=True)
class _Packed:
    """An error that is sent to another process."""

    pickled: bytes  # b"" if it does not pickle
    plain: Exception  # the nearest built-in exception, with the same text
    trace: str


@dataclass(frozen=True)
class _Result:
    """The result of a step: a batch or an error. Opaque to grain."""

    batch: Batch | None = None
    error: Exception | _Packed | None = None


def _as_bytes(result: _Result, workers: int) -> np.ndarray:
    """The message of a worker: one array, which grain sends through shared memory.

    Long captions outside of the array would use a pipe, and no process can end while its pipe is
    full.
    """
    _prepare_worker()
    sent = np.frombuffer(pickle.dumps(result, pickle.HIGHEST_PROTOCOL), np.uint8)
    if os.path.isdir(SHARED_MEMORY):
        # Writing to full shared memory kills the process. Each worker writes one batch at a time.
        free = shutil.disk_usage(SHARED_MEMORY).free
        if free < workers * sent.nbytes:
            problem = OSError(
                f"{SHARED_MEMORY} has {free / 1e6:.0f} MB left, too little for {workers} workers "
                f"with batches of {sent.nbytes / 1e6:.0f} MB; use fewer workers (0: threads), or "
                "give it more memory (docker run --shm-size=8g)"
            )
            return np.frombuffer(pickle.dumps(_Result(error=_packed(problem))), np.uint8)
    return sent


def _packed(error: Exception) -> _Packed:
    try:
        pickled = pickle.dumps(error)
    except Exception:
        pickled = b""
    kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)
    trace = "".join(traceback.format_exception(error))
    return _Packed(pickled, kind(str(error)), f"In a worker process:\n{trace}")


def _restored(error: Exception | _Packed) -> Exception:
    """The error itself, else the nearest built-in one with the same text."""
    if not isinstance(error, _Packed):
        return error
    restored = error.plain
    # A class with arguments other than its text may fail here, or have another text.
    with suppress(Exception):
        loaded = pickle.loads(error.pickled)
        if str(loaded) == str(error.plain):
            restored = loaded
    restored.add_note(error.trace)
    return restored


@cache
def _prepare_worker() -> None:
    """Makes a worker end quickly on request, and when its parent is killed."""
    # At exit, after its messages were sent, because the end of an interpreter takes a second. Not
    # 0, which to grain means that the worker is still running.
    util.Finalize(None, os._exit, args=(1,), exitpriority=-100)

    end_with_parent()


def end_with_parent() -> None:
    """Makes this process, a worker, end when its parent is killed."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM for this thread and the processes that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
