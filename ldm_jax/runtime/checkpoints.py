"""Checkpoints of a run: orbax, with a checksum of every file.

A step is written to a temporary directory and renamed when complete, so that a crash, a full disk
or a second Ctrl-C leaves the previous checkpoint intact. Then `sums.txt` is added, with a line
"crc32 size name" for each file and a last line with the checksum of the lines before. A checkpoint
without it, of an older version or after a crash at that moment, is read without verification.
"""

import json
import logging
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ldm_jax.runtime.processes import gather, is_first

log = logging.getLogger(__name__)

SUMS = "sums.txt"


class DamagedCheckpoint(ValueError):
    """A checkpoint differs from what was written; names the file or the fault of its values."""


class Checkpoints:
    """The checkpoints under `directory`; the newest `keep` are kept."""

    def __init__(self, directory: Path, keep: int = 2):
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "about": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )
        self._writer: threading.Thread | None = None
        self._failure: OSError | None = None

    def steps(self) -> list[int]:
        """The steps with a checkpoint, complete or damaged, the newest first."""
        self.wait()
        return self._steps()

    def _steps(self) -> list[int]:
        return sorted(self._manager.all_steps(), reverse=True)

    def latest(self) -> int | None:
        """The newest checkpoint's step, or None."""
        return next(iter(self.steps()), None)

    def save(
        self,
        step: int,
        state: Any,
        about: dict[str, Any],
        saved: Callable[[], None] = lambda: None,
        wait: bool = True,
    ) -> None:
        """Writes a pytree of arrays and a JSON-able description beside it, and calls `saved`.

        Without `wait` and with one process, it returns when the arrays are copied to the host, and
        a thread writes them. What it could not write is raised by the next call of a method here,
        `check` included.

        Raises:
          OSError: the disk is full or not writable; names the path, and the intact checkpoint.
        """
        self.wait()
        if wait or jax.process_count() > 1:
            self._write(step, state, about)
            saved()
            return
        held = jax.tree.map(np.array, state)  # the next step overwrites the device's

        def write():
            try:
                self._write(step, held, about)
            except OSError as error:
                self._failure = error
            else:
                saved()

        self._writer = threading.Thread(target=write, name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Returns when nothing is being written; raises what could not be."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self.check()

    def check(self) -> None:
        """Raises what could not be written, if that is known."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write(self, step: int, state: Any, about: dict[str, Any]) -> None:
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
        )
        before = next(iter(self._steps()), None)
        try:
            self._manager.save(step, args=arguments)
            self._manager.wait_until_finished()
            if is_first():
                _write_sums(self.directory / str(step))
            gather()  # no other process goes on before the checkpoint is whole
        except Exception as error:  # orbax and its storage layer raise many kinds
            survivor = "no earlier one exists" if before is None else f"step {before} is intact"
            raise OSError(
                f"cannot write the checkpoint of step {step} under {self.directory} ({survivor}): "
                f"{error}"
            ) from error

    def restore(self, step: int, abstract: Any) -> Any:
        """The state of a step. `abstract` has the shape, type and sharding of each array.

        Raises:
          DamagedCheckpoint: names the file.
          ValueError: it is of another architecture; names the leaves.
        """
        verified = _verify_once(self.directory / str(step))
        wanted = _shapes(abstract)
        try:
            saved = _shapes(self._manager.item_metadata(step).state.tree)
            if saved == wanted:
                arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
                return self._manager.restore(step, args=arguments).state
        except Exception as error:  # orbax and its storage layer raise many kinds
            if verified:
                raise  # the files are intact
            reason = str(error).strip().partition("\n")[0][:300]
            raise DamagedCheckpoint(f"{type(error).__name__}: {reason}") from error
        raise ValueError(
            f"the checkpoint of step {step} under {self.directory} is of another architecture:\n"
            f"{_difference(saved, wanted)}\n"
            "Choose another --workdir, or give the settings that it was trained with."
        )

    def restore_newest(
        self, abstract: Any, problem: Callable[[Any], str] = lambda state: ""
    ) -> tuple[int, Any] | None:
        """(step, state) of the newest complete checkpoint; None if there is no checkpoint.

        Damaged ones are named in a warning and set aside as `STEP.damaged`. `problem` returns the
        fault of a state that was read, "" for none.

        Raises:
          ValueError: every checkpoint is damaged; lists them.
        """
        damaged = {}
        for step in self.steps():
            try:
                state = self.restore(step, abstract)
                if wrong := problem(state):
                    del state  # frees its memory for the next one
                    raise DamagedCheckpoint(wrong)
            except DamagedCheckpoint as error:
                damaged[step] = str(error)
                continue
            for bad, reason in damaged.items():
                log.warning(
                    "The checkpoint of step %d is damaged (%s). It is set aside as %s",
                    *(bad, reason, self._set_aside(bad)),
                )
            if damaged:
                lost = max(damaged) - step
                log.warning("Resuming from step %d: %d steps are lost, trained again", step, lost)
            return step, state
        if damaged:
            listed = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            raise ValueError(
                f"no checkpoint under {self.directory} is whole ({listed}). Copy one back from a "
                f"backup, or remove {self.directory} to train from step 0."
            )
        return None

    def newest_about(self) -> dict[str, Any] | None:
        """The description of the newest checkpoint with a readable one, or None."""
        for step in self.steps():
            try:
                _verify_once(self.directory / str(step))
                return self.about(step)
            except Exception as error:  # orbax and its storage layer raise many kinds
                log.warning("The checkpoint of step %d cannot be read: %s", step, error)
        return None

    def about(self, step: int) -> dict[str, Any]:
        """The description of a step."""
        arguments = ocp.args.Composite(about=ocp.args.JsonRestore())
        return self._manager.restore(step, args=arguments).about

    def close(self) -> None:
        try:
            self.wait()
        finally:
            # orbax does not wait for its clean-up, which prints a traceback if Python exits first.
            getattr(self._manager, "_maybe_await_cleanup_tmp_directory", lambda: None)()
            self._manager.close()

    def _set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that its step can be saved again."""
        path = self.directory / str(step)
        aside = path.with_name(f"{step}.damaged")
        if is_first():
            shutil.rmtree(aside, ignore_errors=True)  # an earlier damaged one
            path.rename(aside)
        gather()
        self._manager.reload()
        return aside


def abstract_like(state: Any, shardings: Any) -> Any:
    """Shapes and types of `state` with shardings, for `restore`."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        state,
        shardings,
    )


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value


def _write_sums(directory: Path) -> None:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    lines = [
        f"{_crc32(path):08x} {path.stat().st_size} {path.relative_to(directory).as_posix()}\n"
        for path in files
    ]
    body = "".join(lines).encode()
    partial = directory / f"{SUMS}.partial"
    partial.write_bytes(body + f"{zlib.crc32(body):08x}\n".encode())
    partial.replace(directory / SUMS)


def _verify(directory: Path) -> bool:
    """Compares every file with `SUMS`; False where there is none. Raises DamagedCheckpoint."""
    path = directory / SUMS
    if not path.exists():
        return False
    try:
        body, own = path.read_bytes()[:-9], path.read_bytes()[-9:]
        if own != f"{zlib.crc32(body):08x}\n".encode():
            raise DamagedCheckpoint(f"{SUMS} is not as it was written")
        for line in body.decode().splitlines():
            crc, size, name = line.split(" ", 2)
            file = directory / name
            if not file.exists():
                raise DamagedCheckpoint(f"{name} is missing")
            if file.stat().st_size != int(size):
                raise DamagedCheckpoint(f"{name} has {file.stat().st_size} bytes instead of {size}")
            if _crc32(file) != int(crc, 16):
                raise DamagedCheckpoint(f"{name} has other bytes than were written")
    except OSError as error:
        raise DamagedCheckpoint(str(error)) from error
    return True


def _verify_once(directory: Path) -> bool:
    """`_verify` by process 0, for all processes."""
    verified, damage = False, ""
    if is_first():
        try:
            verified = _verify(directory)
        except DamagedCheckpoint as error:
            damage = str(error)
    verified, damage = json.loads(gather(json.dumps([verified, damage]))[0])
    if damage:
        raise DamagedCheckpoint(damage)
    return verified


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """{path: shape} of arrays or of orbax's descriptions of arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {_name(path): tuple(leaf.shape) for path, leaf in leaves}


def _name(path: tuple) -> str:
    # Attributes of dataclasses and tuples here are entries of a dict there.
    fields = ("key", "name", "idx")
    return "/".join(
        str(next(getattr(entry, field) for field in fields if hasattr(entry, field)))
        for entry in path
    )


def _difference(saved: dict[str, tuple], wanted: dict[str, tuple], shown: int = 5) -> str:
    names = [
        name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)
    ]
    lines = [
        f"  {name}: {saved.get(name, '(absent)')} there, {wanted.get(name, '(absent)')} now"
        for name in names[:shown]
    ]
    return "\n".join(lines + [f"  and {len(names) - shown} more"] * (len(names) > shown))
