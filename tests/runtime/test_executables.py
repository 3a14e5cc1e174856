"""Programs in files: found by a new process, for equal arguments alone, mended where damaged."""

import dataclasses
import functools
import logging
import os
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ldm_jax.models.unet import UNet
from ldm_jax.runtime import executables
from ldm_jax.runtime.executables import UNUSED_DAYS, Kept, _text, keep_programs

TRACED = []


def scaled(x, *, by: float = 1.0, of: object = None, callback: object = None):
    TRACED.append(x.shape)
    if callback is not None:
        jax.debug.callback(callback, x)
    return {"sum": jnp.sum(jnp.sin(x)) * by, "each": (jnp.cos(x), None)}


def process() -> Kept:
    """`scaled` as a new process has it: nothing of it is in memory, nor in jax's own caches."""
    TRACED.clear()
    function = types.FunctionType(scaled.__code__, globals(), scaled.__name__)
    function.__kwdefaults__ = scaled.__kwdefaults__
    return Kept(function, ("by", "of", "callback"))


@pytest.fixture(autouse=True)
def own_code(monkeypatch):
    monkeypatch.setattr(executables, "LIBRARIES", executables.LIBRARIES | {__name__.split(".")[0]})


@pytest.fixture
def folder(tmp_path):
    keep_programs(tmp_path / "programs")
    yield tmp_path / "programs"
    keep_programs(None)


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


X = np.linspace(0.0, 1.0, 16, dtype=np.float32)


def test_a_second_process_neither_traces_nor_compiles(folder):
    first = process()(X)
    assert TRACED == [(16,)] and len(list(folder.iterdir())) == 1
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    second = process()(X)
    assert TRACED == []
    assert not [name for name in events if "trace" in name or "backend_compile" in name]
    same(first, second)


def test_a_program_from_jax_cache_is_kept_whole(folder):
    """jaxlib serialises what it has read from its own cache without parts of it on a CPU."""
    expected = process().jitted(X)  # now it is in jax's cache
    process()(X)
    same(process()(X), expected)


@functools.lru_cache
def mesh(devices: int) -> jax.sharding.Mesh:
    own = jax.devices()[:devices]
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=own)


def test_programs_of_one_and_of_several_devices(folder):
    expected = None
    for devices in (1, 2, 8):
        x = jax.device_put(X, NamedSharding(mesh(devices), PartitionSpec("data")))
        with jax.set_mesh(mesh(devices)):
            process()(x)
            found = process()(x)
        assert TRACED == []
        assert len(found["each"][0].sharding.device_set) == devices
        expected = expected or found
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)
    for device in jax.devices()[:4:3]:
        process()(jax.device_put(X, device))
        assert process()(jax.device_put(X, device))["sum"].devices() == {device}
    assert len(list(folder.iterdir())) == 5


OTHERS = {
    "shape": (X[:8], {}),
    "type": (X.astype(np.float16), {}),
    "weak type": (1.0, {}),
    "static value": (X, {"by": 2.0}),
    "static type": (X, {"by": 1}),
    "static network": (X, {"of": UNet()}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_program_for_another(folder, name):
    process()(X, by=1.0)
    x, options = OTHERS[name]
    process()(x, **{"by": 1.0} | options)
    assert len(TRACED) == 1 and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("around", [jax.default_matmul_precision("float32"), jax.debug_nans(True)])
def test_another_program_under_another_setting(folder, around):
    process()(X)
    with around:
        process()(X)
    assert len(TRACED) == 1 and len(list(folder.iterdir())) == 2


def test_another_program_in_a_mesh(folder):
    process()(X)
    with jax.set_mesh(mesh(2)):
        process()(X)
    assert len(TRACED) == 1 and len(list(folder.iterdir())) == 2


@dataclasses.dataclass(frozen=True)
class One:
    value: object


@dataclasses.dataclass(frozen=True)
class Other:
    value: object


def test_text_of_static_arguments():
    small, large = np.zeros(3), np.zeros(10_000)
    values = [
        *(None, 0, 0.0, False, "0", b"0", (0,), [0], {"a": 0}, {"a": 1}, {"b": 0}),
        *(One(0), Other(0), One(1), One(One(0)), UNet(), UNet(channel_mult=(1, 2))),
        *(small, small[:2], np.float32(small), np.array([0.0, 0.0, 1e-300])),
        *(large, np.eye(1, 10_000, 5_000)[0]),  # NumPy shortens the text of both to the same
        *(np.float32, np.dtype(np.float32), jnp.bfloat16, scaled, functools.partial(scaled)),
    ]
    texts = [_text(value) for value in values]
    assert len(set(texts)) == len(texts)
    assert _text(UNet()) == _text(UNet()) and _text(small) == _text(small.copy())
    for value in (lambda: 0, object(), jnp.zeros(2), One(lambda: 0)):
        with pytest.raises(TypeError):
            _text(value)


def test_no_file_for_what_cannot_be_kept(folder):
    seen = []
    found = process()(X, callback=seen.append)
    jax.effects_barrier()
    same(found["each"][0], process()(X, of=lambda: 0)["each"][0])
    with jax.disable_jit():
        same(found["each"][0], process()(X)["each"][0])
    assert len(seen) == 1 and not folder.exists()


def test_no_file_for_code_that_may_change(folder, monkeypatch):
    """A network of the user's own has the same name and fields after a change."""
    monkeypatch.undo()
    process()(X)
    with pytest.raises(TypeError, match="One may be something else in another process"):
        _text((UNet(), One(0)))
    assert _text((UNet(), np.float32)) and not folder.exists()


DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "flipped": lambda content: content[:99] + bytes([content[99] ^ 1]) + content[100:],
    "something else": lambda content: b"not a program",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_named_and_written_again(folder, how, caplog):
    expected = process()(X)
    (path,) = folder.iterdir()
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    same(process()(X), expected)
    assert TRACED == [(16,)]
    assert path.name in caplog.text and "cannot be read" in caplog.text
    process()(X)
    assert TRACED == []


def test_a_directory_that_cannot_be_written(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "file").touch()
    keep_programs(tmp_path / "file" / "programs")
    try:
        process()(X)
    finally:
        keep_programs(None)
    assert "is not kept" in caplog.text


def test_files_of_long_ago_are_deleted(folder):
    process()(X)
    (used,) = folder.iterdir()
    (unused := folder / "unused").touch()
    (recent := folder / "recent").touch()
    for path, days in ((used, UNUSED_DAYS + 1), (unused, UNUSED_DAYS + 1), (recent, 1)):
        os.utime(path, (time.time() - 86_400 * days,) * 2)
    process()(X)  # used now
    process()(X[:4])
    assert used.exists() and recent.exists() and not unused.exists()
