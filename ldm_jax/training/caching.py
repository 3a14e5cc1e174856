"""Makes a cache of latents and of the states of captions: see `write_cache`.

A shard has the next so many examples of a split, so it depends on nothing but the data and the
options: processes share the shards, and what is finished stays.
"""

import dataclasses
import functools
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from tqdm import tqdm

from ldm_jax.data.latent_shards import DTYPES, FORMAT, MEND, SPLITS, LatentContents
from ldm_jax.data.loader import Loader
from ldm_jax.data.shards import read_contents
from ldm_jax.data.sources import Subset
from ldm_jax.data.whole_files import begin, locked, write_whole
from ldm_jax.models.build import make_autoencoder
from ldm_jax.runtime.mesh import AXES, replicated, spread
from ldm_jax.runtime.processes import gather, is_first
from ldm_jax.training.cache_shards import Shard, text_arrays
from ldm_jax.training.latents import (
    autoencoder_fingerprint,
    data_facts,
    fingerprint,
    moments,
    moments_shape,
)
from ldm_jax.training.tasks import make_task
from ldm_jax.training.text_states import CachedStates, frozen_texts, text_fingerprint
from ldm_jax.training.workdir import check_processes, check_shared, config_dict

log = logging.getLogger(__name__)
LOOKED_AT = 10_000  # examples whose names and captions show that the data are the same
AHEAD = 2  # batches whose latents are computed before those of the first are written


@dataclasses.dataclass(frozen=True)
class Options:
    """What determines the files of a cache, beside the config; flags of `ldm_jax.cache`.

    Attributes:
      dtype: of the stored numbers, one of `latent_shards.DTYPES`.
      flips: whether the moments of the mirror images are stored too.
      states: whether the states of frozen text encoders are stored.
      shard_size: number of examples in a shard.
      batch_size: of pictures that are encoded together, on all devices of a process.
    """

    dtype: str = "float32"
    flips: bool = True
    states: bool = True
    shard_size: int = 1024
    batch_size: int = 32


def write_cache(config: Any, out: str | Path, options: Options | None = None) -> dict[str, Any]:
    """Writes the shards that are missing in the folder `out`, and returns its report.

    Killed at any moment, the same call goes on where it was, and the files are the same as without
    interruption. With several processes each calls it, and `out` must be a folder that all see.

    Args:
      config: of a diffusion model; its data, its autoencoder, and its text encoders that do not
        train are used. With `latents="shards"`, moments are taken from `config.cache`, a folder of
        tars, in place of pictures.
      out: a new or empty folder, or one that was begun with the same config and options.

    Raises:
      ValueError: a setting that cannot be used, `out` holds other files or was begun with others,
        another process writes there, or a number does not fit into `dtype`.
    """
    options = options or Options()
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype={options.dtype}: choose one of {', '.join(DTYPES)}")
    folder = Path(os.path.abspath(os.path.expanduser(out)))
    with ExitStack() as stack:
        if is_first():
            stack.enter_context(locked(folder))
        check_processes(config_dict(config) | {"out": str(folder)} | dataclasses.asdict(options))
        check_shared(folder)
        task = _open_task(config, folder)
        work = _Work.of(task, options, folder)
        if is_first():
            begin(folder, work.facts, CHANGED)
        gather()
        local = np.array(jax.local_devices()).reshape(-1, 1, 1)
        with jax.set_mesh(Mesh(local, AXES, axis_types=(AxisType.Auto,) * 3)):
            work.write()
        gather()
        report = _report(folder, work) if is_first() else {}
    return report


# What a message says of facts that differ from those with which a cache was begun.
CHANGED = {
    "format": "another version of ldm_jax",
    "data": "other data (config.data)",
    "examples": "other data: pictures or captions have changed since",
    "classes": "other classes",
    "shape": "latents of another shape",
    "autoencoder": "another autoencoder",
    "states": "other text encoders",
    "texts": "other text encoders, or another precision",
}


def _open_task(config: Any, folder: Path) -> Any:
    """The task; process 0 is the first to look through the data, and the others use its index."""
    if config.task != "diffusion":
        raise ValueError(
            f"task={config.task!r} has no latents to store: name a config of diffusion"
        )
    config = config.copy_and_resolve_references()
    config.latents = "shards" if config.latents == "shards" else "step"
    config.text_states, config.data.augment = "step", ()
    if config.data.get("buckets"):
        raise ValueError("data.buckets: a cache has latents of one shape; set it to False")
    if config.get("prior"):
        config.prior.prompt = ""
    if not is_first():
        gather()
    task = make_task(config, folder / ".pictures.json")
    if is_first():
        gather()
    return task


@dataclasses.dataclass(frozen=True)
class _Work:
    """What is written, and how.

    `facts` are stored as options.json. `texts` are the frozen text encoders.
    """

    folder: Path
    options: Options
    facts: dict[str, Any]
    sources: dict[str, Any]
    autoencoder: Any
    params: Any
    texts: tuple[CachedStates, ...]
    workers: int

    @classmethod
    def of(cls, task: Any, options: Options, folder: Path) -> "_Work":
        section, params = task.resolved["autoencoder"], task.frozen["autoencoder"]
        stored = getattr(task.source, "latents", False)
        if stored and options.flips:
            raise ValueError(f"{task.config.cache} has no moments of mirror images: give --noflips")
        trains = jax.eval_shape(task.init, jax.random.key(0), task.loaded)
        names = frozen_texts(task.embedders, trains) if options.states else ()
        texts = tuple(
            CachedStates(e, task.frozen[e.name]) for e in task.embedders if e.name in names
        )
        sections, precision = task.resolved["conditioning"], task.config.get("precision", "float32")
        sources = dict(zip(SPLITS, (task.source, task.held_out), strict=True))
        facts = dict(
            format=FORMAT,
            data=data_facts(task.config.data),
            examples={split: [len(s), _digest(s)] for split, s in sources.items()},
            classes=list(task.source.classes),
            shape=moments_shape(section, task.config.data.image_size),
            autoencoder=autoencoder_fingerprint(section, params),
            states={text.name: _fields(text) for text in texts},
            texts={n: text_fingerprint(sections[n], task.frozen[n], precision) for n in names},
        )
        given = dataclasses.asdict(options) | {"states": facts["states"]}
        autoencoder, workers = make_autoencoder(section), task.config.data.workers
        return cls(folder, options, facts | given, sources, autoencoder, params, texts, workers)

    def write(self) -> None:
        """Writes this process's missing shards."""
        own, count = _share()
        todo, size = [], self.options.shard_size
        for split, source in self.sources.items():
            (self.folder / split).mkdir(exist_ok=True)
            shards = range(-(-len(source) // size))
            todo += [
                (split, number)
                for number in shards
                if number % count == own and not _is_whole(self.folder / split, number)
            ]
        if not todo:
            return
        bar = tqdm(
            desc="Encoding", total=sum(len(self._range(*shard)) for shard in todo),
            unit=" pictures", dynamic_ncols=True, disable=None if is_first() else True,
        )  # fmt: skip
        params = jax.device_put(self.params, replicated(jax.sharding.get_mesh()))
        with bar:
            for split in SPLITS:
                own = [number for name, number in todo if name == split]
                self._write_split(split, own, params, bar)

    def _range(self, split: str, number: int) -> range:
        """The examples of a shard."""
        size = self.options.shard_size
        return range(number * size, min((number + 1) * size, len(self.sources[split])))

    def _write_split(self, split: str, shards: Sequence[int], params: Any, bar: tqdm) -> None:
        """A batch is of one shard, so that it is the same whatever other shards are missing: the
        last one of a shard repeats its last example."""
        indices, of_batches = [], []
        for number in shards:
            examples, size = list(self._range(split, number)), self.options.batch_size
            rest = -len(examples) % size
            for start in range(0, len(examples), size):
                of_batches.append((number, min(size, len(examples) - start)))
            indices += examples + examples[-1:] * rest
        if not indices:
            return
        source = self.sources[split]
        stored = getattr(source, "latents", False)
        entries = ("moments" if stored else "image", "name", "caption", "label", "placed")
        loader = Loader(
            Subset(source, indices), self.options.batch_size, 0, _placed, entries,
            shuffle=False, workers=self.workers,
        )  # fmt: skip
        shard = None
        with closing(loader.iterate()) as batches:
            for (number, count), batch, arrays in self._encoded(of_batches, batches, params):
                if shard is None:
                    shard = Shard(self.folder / split, number, self.options.dtype)
                rows = [np.asarray(array)[:count] for array in arrays]
                shard.add({name: values[:count] for name, values in batch.items()}, rows)
                bar.update(count)
                if len(shard.names) == len(self._range(split, number)):
                    shard.finish(self.texts)
                    shard = None

    def _encoded(self, of_batches: Sequence[Any], batches: Iterator, params: Any) -> Iterator:
        """Each batch with its moments, and those of its mirror images; the device works ahead."""
        waiting = []
        for about, (_, batch) in zip(of_batches, batches, strict=False):
            images = batch.pop("image", None)
            if images is None:
                arrays = [batch.pop("moments")]
            else:
                both = (images, images[:, :, ::-1]) if self.options.flips else (images,)
                arrays = [
                    _encode(self.autoencoder, params, spread(np.ascontiguousarray(x))) for x in both
                ]
            waiting.append((about, batch, arrays))
            if len(waiting) == AHEAD:
                yield waiting.pop(0)
        yield from waiting


@functools.partial(jax.jit, static_argnums=0)
def _encode(autoencoder: Any, params: Any, images: jax.Array) -> jax.Array:
    return moments(autoencoder, params, images)


def _share() -> tuple[int, int]:
    """This process writes each n-th shard from the i-th on: (i, n)."""
    return jax.process_index(), jax.process_count()


def _placed(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """The example with its placement as numbers; zeros if it has none."""
    del rng
    where = example.get("placement")
    numbers = (0,) * 8
    if where is not None:
        numbers = (*where.original, *where.resized, *where.corner, *where.size)
    return example | {"placed": np.array(numbers, np.int32)}


def _fields(text: CachedStates) -> dict[str, tuple[tuple[int, ...], str]]:
    arrays = text_arrays(text.null(1))
    return {field: (array.shape[1:], str(array.dtype)) for field, array in arrays.items()}


def _digest(source: Any) -> str:
    """Of names and captions, at even distances."""
    chosen = range(0, len(source), max(len(source) // LOOKED_AT, 1))
    known = (source.describe(i) for i in chosen)
    return fingerprint([[k["name"], k["caption"]] for k in known], {})


def _is_whole(folder: Path, number: int) -> bool:
    try:
        read_contents(folder, number, LatentContents)
    except ValueError:
        return False
    return True


def _report(folder: Path, work: _Work) -> dict[str, Any]:
    """Writes and returns `report.json`: what there is, and what storing it has changed, as the
    root of the mean squared difference, relative to that of the numbers."""
    report: dict[str, Any] = {}
    errors = defaultdict(lambda: np.zeros(2))
    for split, source in work.sources.items():
        found = dict(examples=len(source), shards=-(-len(source) // work.options.shard_size))
        shards = [
            read_contents(folder / split, number, LatentContents, MEND)
            for number in range(found["shards"])
        ]
        for shard in shards:
            for name, sums in shard.errors.items():
                errors[name] += sums
        report[split] = found | {
            "records": sum(shard.records for shard in shards),
            "bytes": sum(shard.bytes for shard in shards),
        }
    report["relative_error"] = {n: float(np.sqrt(a / b)) for n, (a, b) in errors.items() if b}
    first = work.sources["train"]
    report |= dict(left_out=dict(first.left_out), lost_captions=dict(first.lost_captions))
    report["states"] = [text.name for text in work.texts]
    write_whole(folder / "report.json", json.loads(json.dumps(report)))
    return report


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"{split:>9}: {found['examples']:,} examples in {found['shards']:,} shards, "
        f"{found['bytes'] / 1e6:,.1f} MB"
        for split, found in report.items()
        if isinstance(found, dict) and "shards" in found
    ]
    for name, error in report["relative_error"].items():
        lines.append(f"{name:>9}: storing them has changed them by {error:.2g} of their size")
    return "\n".join(lines)
