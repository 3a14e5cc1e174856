"""A run's directory: making, locking, and refusing one that belongs to another run."""

import contextlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from ldm_jax.runtime.checkpoints import Checkpoints
from ldm_jax.runtime.processes import check_alike, gather, is_first
from ldm_jax.version import __version__

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)

# Settings of the reading of data, which processes may have of their own.
OF_A_PROCESS = ("data.path", "data.workers", "cache")
# Settings that may differ when a run resumes, as dotted keys or sections: lengths and intervals,
# devices, memory and precision, the location and reading of the data, previews and evaluators.
HARMLESS = (
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.preview_every",
    "train.keep",
    "train.mllog",
    "train.steps_per_call",
    "train.accumulate",
    "train.remat",
    "precision",
    "optimizer.moments",
    "mesh",
    "sharding",
    "data.path",
    "data.on_error",
    "data.workers",
    "cache",
    "sampling",
    "evaluators",
)


def config_dict(config: Any) -> dict[str, Any]:
    """A ConfigDict as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json())


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Makes `workdir` and locks it against other runs; the lock ends with the process.

    Raises:
      ValueError: another process trains there; names its pid.
      OSError: the directory cannot be made or written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("a+")
    except OSError as error:
        raise OSError(f"cannot write to the workdir {workdir}: {error}") from error
    with file:
        if fcntl and is_first():  # the processes of one run share its workdir
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ValueError(
                    f"{workdir} is in use: process {file.read().strip() or 'unknown'} trains there"
                ) from None
            except OSError:
                pass  # a file system without locks
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield


def check_shared(workdir: Path, wait: float = 10.0) -> None:
    """Checks that every process sees the files that process 0 writes in `workdir`.

    Raises:
      ValueError: the processes see different directories.
    """
    if jax.process_count() == 1:
        return
    mark = workdir / ".shared"
    if is_first():
        mark.write_text(name := uuid.uuid4().hex)
    else:
        name = ""
    name, deadline = gather(name)[0], time.monotonic() + wait
    while not (seen := mark.exists() and mark.read_text() == name):
        if time.monotonic() > deadline:  # a network's file system may show a file late
            break
        time.sleep(0.1)
    blind = [str(i) for i, answer in enumerate(gather("yes" if seen else "")) if not answer]
    if is_first():
        mark.unlink()
    if blind:
        raise ValueError(
            f"process {', '.join(blind)} does not see what process 0 writes in {workdir}: give a "
            "--workdir on a file system that all processes share"
        )


def check_processes(config: dict[str, Any]) -> None:
    """Checks that all processes train the same config, with the same versions.

    Raises:
      ValueError: shows the difference.
    """

    def difference(a, b):
        different = config_difference(a, b)
        return {key: pair for key, pair in different.items() if key not in OF_A_PROCESS}

    versions = {"ldm_jax": __version__, "jax": jax.__version__}
    check_alike(config | {"version": versions}, difference)


def check_config(workdir: Path, config: dict[str, Any], checkpoints: Checkpoints) -> None:
    """Refuses a workdir in which another config was trained.

    Raises:
      ValueError: shows the difference.
    """
    if checkpoints.latest() is None and not (workdir / "model.safetensors").exists():
        if _read(workdir / "config.json") not in (None, config):
            log.info(
                "Nothing was trained in %s yet: another config replaces the one there", workdir
            )
        return
    there = _stored_config(workdir, checkpoints)
    different = config_difference(there, config) if there else {}
    lines = {key: f"  {key}: {a} there, {b} now" for key, (a, b) in different.items()}
    refused = [line for key, line in lines.items() if not is_harmless(key)]
    if refused:
        raise ValueError(
            f"{workdir} holds a run of another config:\n" + "\n".join(refused) + "\n"
            "Choose another --workdir, or give the same settings to resume this one."
        )
    if lines:
        log.info("The run in %s resumes with changes:\n%s", workdir, "\n".join(lines.values()))


def write_config(workdir: Path, config: dict[str, Any]) -> None:
    """Writes `config.json`, whole or not at all, unless it is already the same.

    Raises:
      OSError: it cannot be written; the old file is intact.
    """
    path = workdir / "config.json"
    if not is_first() or _read(path) == config:
        return
    partial = path.with_name("config.json.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(config, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"cannot write to the workdir {workdir}: {error}") from error


def is_harmless(key: str) -> bool:
    """Whether a dotted key is one of `HARMLESS` or lies in a section that is."""
    return any(key == name or key.startswith(name + ".") for name in HARMLESS)


def config_difference(there: dict, now: dict) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (value there, value now)} for all settings that differ.

    An option that is off, such as () or 0, is the same as one that an older run did not know.
    """
    a, b = flatten_dict(there, sep="."), flatten_dict(now, sep=".")
    absent = "(absent)"
    pairs = {key: (a.get(key, absent), b.get(key, absent)) for key in sorted(a.keys() | b.keys())}
    off = ((absent, 0), (absent, ""), (absent, []), (0, absent), ("", absent), ([], absent))
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and pair not in off}


def _stored_config(workdir: Path, checkpoints: Checkpoints) -> dict[str, Any] | None:
    """The config of the run in `workdir`, from config.json or else from a checkpoint."""
    path = workdir / "config.json"
    there = _read(path)
    if there is not None:
        return there
    about = checkpoints.newest_about() or {}
    source = "a checkpoint" if "config" in about else "the settings given now"
    log.warning("%s is missing or damaged: taking the config from %s", path, source)
    return about.get("config")


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a config.json; None if it is missing or damaged."""
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return there if isinstance(there, dict) and there else None
