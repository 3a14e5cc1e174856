"""Compiled programs in files, which a later process runs without tracing or compiling them.

jax's own cache finds a program by its traced form, so that only compiling is saved; for a small
model, tracing takes longer than drawing.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import pickle
import platform
import time
import types
import zlib
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from ldm_jax.data.whole_files import publish

log = logging.getLogger(__name__)

UNUSED_DAYS = 30  # after which a file is deleted
# Libraries whose version, or code, is part of what a file is found by.
LIBRARIES = {"ldm_jax", "builtins", "jax", "numpy", "flax"}
_directory: Path | None = None


def keep_programs(directory: str | os.PathLike | None) -> None:
    """Keeps the programs of every `kept` function in `directory`; None: no longer.

    Its files are unpickled: it must belong to the user alone, as jax's own cache must.
    """
    global _directory
    _directory = None if directory is None else Path(directory)


class Kept:
    """`function` under `jax.jit`; once `keep_programs` has named a directory, its programs are
    kept there.

    A file is found by all that its program depends on: the static arguments; the shapes, types and
    devices of the others; the code of this library; versions; jax's settings; the machine. The
    jitted function runs instead where a program cannot be kept: one with a callback, with a class
    of other code than `LIBRARIES`, or in several processes. Static arguments are given by name.
    """

    def __init__(self, function: Callable, static: Sequence[str]):
        self.function, self.static = function, static
        self._programs: dict[str, Callable] = {}

    @functools.cached_property
    def jitted(self) -> Callable:
        """The function under `jax.jit`, for the devices of this process."""
        return jax.jit(self.function, static_argnames=self.static, compiler_options=_options())

    def trace(self, *args: Any, **options: Any) -> jax.stages.Traced:
        """As `jax.jit(…).trace`, for any devices."""
        return jax.jit(self.function, static_argnames=self.static).trace(*args, **options)

    def __call__(self, *args: Any, **options: Any) -> Any:
        fixed = {name: options.pop(name) for name in self.static if name in options}
        program = self._program(args, options, fixed)
        if program is None:
            return self.jitted(*args, **options, **fixed)
        return program(*args, **options)

    def _program(self, args: tuple, options: dict, fixed: dict) -> Callable | None:
        if _directory is None or jax.config.jax_disable_jit or jax.process_count() > 1:
            return None
        try:
            static = _text((self.function, fixed))
        except TypeError:
            return None
        leaves, tree = jax.tree.flatten((args, options))
        parts = (static, str(tree), *map(_array, leaves), _context())
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        if key not in self._programs:
            path = _directory / f"{self.function.__name__}-{key}"
            program = _read(path, tree, leaves)
            if program is None:
                lowered = self.jitted.lower(*args, **options, **fixed)
                with _without_cache():
                    program = lowered.compile()
                _write(path, program)
            self._programs[key] = program
        return self._programs[key]


def kept(*static: str) -> Callable[[Callable], Kept]:
    """A decorator: `Kept` with these static arguments."""
    return functools.partial(Kept, static=static)


@contextlib.contextmanager
def _without_cache():
    """Turns off jax's own cache: what a CPU's backend has read from there, it serialises without
    parts of it, which only running it shows (jaxlib 0.10 to 0.12)."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # jax looks at the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()


def _options() -> dict[str, int]:
    """On a CPU, LLVM's level 1 compiles a sampling program in half the time, and it runs as fast,
    for what takes time there is in libraries; a training step gains nothing (docs/speed.md)."""
    chosen = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    on_cpu = jax.default_backend() == "cpu"
    return {"xla_backend_optimization_level": 1} if on_cpu and not chosen else {}


def _read(path: Path, tree: Any, leaves: list) -> Callable | None:
    """The program in a file for arguments of this structure; None: there is none to be read."""
    if not path.exists():
        return None
    try:
        content, out_tree = pickle.loads(zlib.decompress(path.read_bytes()))
        out_tree = jax.tree.structure(out_tree)
        program = deserialize_and_load(content, tree, out_tree, execution_devices=_devices(leaves))
        os.utime(path)
    except Exception as error:  # a damaged file may raise anything, and is written again
        log.warning("%s cannot be read (%s): compiling anew", path, error)
        return None
    return program


def _write(path: Path, program: jax.stages.Compiled) -> None:
    """Writes a program that its backend can serialise, and deletes those of long ago."""
    try:
        content, _, out_tree = serialize(program)
        out_tree = jax.tree.unflatten(out_tree, range(out_tree.num_leaves))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_bytes(zlib.compress(pickle.dumps((content, out_tree)), 1))
        publish(part, path)
        for other in path.parent.iterdir():
            if time.time() - other.stat().st_mtime > UNUSED_DAYS * 86_400:
                other.unlink(missing_ok=True)
    except (OSError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        log.info("%s is not kept: %s", path, error)


def _devices(leaves: list) -> list:
    """The devices that a program with these arguments runs on, in order."""
    shardings = [leaf.sharding for leaf in leaves if isinstance(leaf, jax.Array)]
    if not shardings:
        return jax.local_devices()[:1]
    widest = max(shardings, key=lambda sharding: len(sharding.device_set))
    mesh = getattr(widest, "mesh", None)
    return list(widest.device_set if mesh is None else mesh.devices.flat)


def _array(leaf: Any) -> str:
    """What a program depends on of an argument."""
    return f"{jax.typeof(leaf)} {getattr(leaf, 'sharding', '')}"


def _text(value: Any) -> str:
    """A text that is equal for equal static arguments in every process, and for no others.

    Raises TypeError for a value without one: a function within a function, or of other code than
    `LIBRARIES`, which may change.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes | np.generic | np.dtype):
        return repr(value)
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, tuple | list):
        return f"{_name(type(value))}({','.join(map(_text, value))})"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_text(key)}:{_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, functools.partial):
        return f"partial{_text((value.func, value.args, value.keywords))}"
    if isinstance(value, type | types.FunctionType):
        return _name(value)
    if dataclasses.is_dataclass(value):
        # A network of Flax has its parent as a field; it is None for all that are arguments.
        names = (field.name for field in dataclasses.fields(value) if field.name != "parent")
        items = (f"{name}={_text(getattr(value, name))}" for name in names)
        return f"{_name(type(value))}({','.join(items)})"
    raise TypeError(f"{type(value)} has no text")


def _name(value: Any) -> str:
    name = f"{value.__module__}.{value.__qualname__}"
    if "<" in name or name.partition(".")[0] not in LIBRARIES:
        raise TypeError(f"{name} may be something else in another process")
    return name


def _context() -> str:
    """What every program depends on and a process may change while it runs."""
    names = (name for name in jax.config.values if "cache" not in name and "log" not in name)
    settings = {name: getattr(jax.config, name, None) for name in names}
    mesh = jax.sharding.get_mesh()
    return f"{_process()} {settings} {mesh} {None if mesh.empty else mesh.devices}"


@functools.cache
def _process() -> str:
    """What every program of this process depends on."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    versions = [f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib", "flax", "numpy")]
    flags = [f"{name}={os.environ.get(name)}" for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    devices = [(device.device_kind, device.client.platform_version) for device in jax.devices()]
    return f"{code.hexdigest()} {versions} {flags} {devices} {_machine()}"


def _machine() -> str:
    """The processor and what it can do."""
    information = Path("/proc/cpuinfo")  # of Linux
    if not information.exists():
        return f"{platform.machine()} {platform.processor()}"
    first = information.read_text().split("\n\n")[0].splitlines()
    return "".join(line for line in first if line.startswith(("model name", "flags", "Features")))
