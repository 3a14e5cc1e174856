"""Makes shards of a data set: see `prepare`.

Processes filter, decode, resize and encode; this process puts their results in the order of the
data set, drops duplicates, and writes one shard after the other. So the shards depend on nothing
but the data set and the options: a shard is a function of where its records start and of the
pictures before it, both of which the finished shards tell.
"""

import itertools
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from ldm_jax.data.data_sets import Columns, DataSet, Item, open_data_set
from ldm_jax.data.faults import reason_of
from ldm_jax.data.filters import Options, Result, prepare_item
from ldm_jax.data.loader import end_with_parent
from ldm_jax.data.shards import Contents, contents_path, read_contents, shard_path
from ldm_jax.data.text_files import printable
from ldm_jax.data.whole_files import begin, locked, publish, write_whole

CHUNK = 8  # number of pictures that a process is given at once
MAX_NAMES = 5  # of the pictures dropped for each reason
DUPLICATE = "the same pixels as an earlier picture"
FORMAT = "ldm_jax shards 1"

Position = tuple[int, int]  # file of the data set, item in it


def prepare(source: str, out: str, options: Options, workers: int = 0) -> dict[str, Any]:
    """Writes the shards that are missing in the folder `out`, and returns its report.

    Killed at any moment, the same call goes on where it was, and the files are the same as without
    interruption, whatever the number of workers. The first of several pictures with the same
    resized pixels is kept.

    Args:
      source: path of a data set; see `data_sets`.
      out: a new or empty folder, or one that was begun with the same source and options.
      workers: number of processes; 0: none but this one.

    Raises:
      FileNotFoundError, ValueError, ImportError: see `open_data_set`; `out` holds other files or
        was begun with other options, another process writes there, or no picture is left.
      ChildProcessError: a worker was killed.
    """
    folder = Path(os.path.abspath(os.path.expanduser(out)))
    with locked(folder):
        data_set = open_data_set(
            source,
            options.kind,
            Columns(options.image_column, options.caption_column, options.label_column),
            dict(
                image_size=options.image_size,
                min_size=options.min_size,
                index=folder / ".index.json",
            ),
        )
        path = os.path.abspath(os.path.expanduser(source))
        given = {"format": FORMAT, "source": printable(path)} | asdict(options)
        changed = (
            f"other data: the files or captions in --source={printable(path)} have changed since"
        )
        begin(folder, given | {"data_set": data_set.digest}, {"data_set": changed})
        shards = _shards(folder, data_set, options, workers)
        report = _report(shards, data_set.lost_captions, options.image_size)
        if not report["kept"]:
            reasons = "; ".join(
                f"{d['count']}: {reason}" for reason, d in report["dropped"].items()
            )
            raise ValueError(
                f"{printable(source)}: of {report['read']} pictures none is left ({reasons})"
            )
        write_whole(folder / "report.json", report)
    return report


def _shards(folder: Path, data_set: DataSet, options: Options, workers: int) -> Iterator[Contents]:
    """The contents of all shards in order; those that are missing or damaged are written."""
    seen: set[str] = set()
    number, start = 0, (0, 0)
    bar = tqdm(desc="Preparing", unit=" pictures", delay=1, dynamic_ncols=True)
    with bar:
        while start:
            contents = _finished(folder, number)
            if contents:
                seen.update(contents.digests)
                bar.update(contents.read)
                yield contents
                number, start = number + 1, contents.next
                continue
            results = _results(_items(data_set, start), options, workers)
            with closing(results):
                for contents in _write(folder, number, results, seen, options.shard_size, bar):
                    yield contents
                    number, start = number + 1, contents.next
                    if _finished(folder, number):
                        break


def _finished(folder: Path, number: int) -> Contents | None:
    try:
        return read_contents(folder, number)
    except ValueError:
        return None


def _write(
    folder: Path,
    number: int,
    results: Iterator[tuple[Position, Result]],
    seen: set[str],
    size: int,
    bar: tqdm,
) -> Iterator[Contents]:
    """Writes successive shards, and yields the contents of each when it is finished.

    A shard ends where the first record of the next one is: what is dropped between belongs to it.
    """
    shard = _Shard(folder, number)
    for position, result in results:
        if result.digest in seen:
            result = Result(result.name, DUPLICATE, result.lost)
        if result.record and len(shard.kept) == size:
            yield shard.finish(position)
            number += 1
            shard = _Shard(folder, number)
        shard.add(result)
        if result.record:
            seen.add(result.digest)
        bar.update()
    yield shard.finish(None)


class _Shard:
    """A shard that is being written."""

    def __init__(self, folder: Path, number: int):
        self._folder, self._number = folder, number
        self._part = shard_path(folder, number).with_suffix(".array_record.part")
        self._writer = None
        self.kept: list[Result] = []
        self._dropped: list[Result] = []
        self._lost: Counter[str] = Counter()

    def add(self, result: Result) -> None:
        if result.lost:
            self._lost[result.lost] += 1
        if not result.record:
            self._dropped.append(result)
            return
        if self._writer is None:
            # Groups of one: random access. Pictures do not compress any further.
            self._writer = ArrayRecordWriter(str(self._part), "group_size:1,uncompressed")
        self._writer.write(result.record)
        self.kept.append(result._replace(record=b""))

    def finish(self, following: Position | None) -> Contents:
        """Gives the files their names: that of the shard last, because it says that both are there.

        A shard without records, which is the only one, has no files.
        """
        dropped: dict[str, tuple[int, list[str]]] = {}
        for result in self._dropped:
            reason = reason_of(result.fault)
            count, names = dropped.get(reason, (0, []))
            dropped[reason] = count + 1, (names + [result.name])[:MAX_NAMES]
        read = len(self.kept) + len(self._dropped)
        columns = zip(*((r.name, r.caption, r.label, r.digest) for r in self.kept), strict=True)
        lists = [list(column) for column in columns] or [[], [], [], []]
        if self._writer is None:
            return Contents(0, following, read, dropped, dict(self._lost), *lists)
        self._writer.close()
        size = self._part.stat().st_size
        contents = Contents(size, following, read, dropped, dict(self._lost), *lists)
        write_whole(contents_path(self._folder, self._number), contents._asdict())
        publish(self._part, shard_path(self._folder, self._number))
        return contents


def _items(data_set: DataSet, start: Position) -> Iterator[tuple[Position, Item]]:
    for file in range(start[0], data_set.files):
        first = start[1] if file == start[0] else 0
        for number, item in enumerate(data_set.read(file, first), first):
            yield (file, number), item


def _results(
    items: Iterator[tuple[Position, Item]], options: Options, workers: int
) -> Iterator[tuple[Position, Result]]:
    """What becomes of each item, in order."""
    chunks = iter(lambda: list(itertools.islice(items, CHUNK)), [])
    if not workers:
        for chunk in chunks:
            yield from _prepare_chunk(chunk, options)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # its imports take seconds
    pool = ProcessPoolExecutor(workers, context, _start_worker)
    pending: deque = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_prepare_chunk, chunk, options))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process that prepares pictures was killed, perhaps for lack of memory: try fewer "
            f"than --workers={workers}; the same command goes on where this one stopped"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes
    end_with_parent()


def _prepare_chunk(
    chunk: Sequence[tuple[Position, Item]], options: Options
) -> list[tuple[Position, Result]]:
    return [(position, prepare_item(item, options)) for position, item in chunk]


def _report(
    shards: Iterable[Contents], lost_captions: Mapping[str, int], image_size: int
) -> dict[str, Any]:
    """What is in `report.json`; `dropped` has the number and the first names of each reason."""
    report: dict[str, Any] = dict.fromkeys(("read", "kept", "shards", "bytes"), 0)
    dropped: dict[str, dict[str, Any]] = {}
    lost = Counter(lost_captions)
    for shard in shards:
        report["read"] += shard.read
        report["kept"] += len(shard.names)
        report["shards"] += 1
        report["bytes"] += shard.bytes
        lost.update(shard.lost_captions)
        for reason, (count, names) in shard.dropped.items():
            entry = dropped.setdefault(reason, {"count": 0, "first": []})
            entry["count"] += count
            entry["first"] = (entry["first"] + names)[:MAX_NAMES]
    return report | dict(image_size=image_size, dropped=dropped, lost_captions=dict(lost))
