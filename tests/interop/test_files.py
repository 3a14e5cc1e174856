"""Files of tensors against the safetensors library, and the messages for damaged ones."""

import json
import os
import re
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from ldm_jax.interop.files import open_shards, open_state, write_safetensors
from tests.interop.test_pickle_reader import tensor, write_legacy, write_zip

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.half": np.array([1.5, -2.0], np.float16),
    "b.brain": np.array([[0.5]], ml_dtypes.bfloat16),
    "b.eighth": np.array([1.5, -2.0], ml_dtypes.float8_e4m3fn),
    "b.other": np.array([1.5, -2.0, 0.0], ml_dtypes.float8_e5m2),
    "steps": np.array(7, np.int64),
    "none": np.zeros((0, 4), np.float32),
    "flags": np.array([True, False, True]),
}
EIGHTS = {"b.eighth", "b.other"}  # which the library gives NumPy no types for
WEIGHT = np.arange(12, dtype=np.float32)


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.of.any.name"


def test_reads_what_the_library_writes(path):
    save_file(TENSORS, path, {"author": "someone"})
    state = open_state(path)
    equal(dict(state), TENSORS)
    assert state.metadata == {"author": "someone"}
    assert len(state) == 8 and "steps" in state and "other" not in state
    assert (state.shape("a.weight"), state.dtype("b.brain")) == ((2, 3), ml_dtypes.bfloat16)
    assert state.place("steps") == f"{path}: steps"
    assert dict(state.renamed({"s": "steps"})) == {"s": 7}


def test_the_library_reads_what_we_write(path):
    tensors = TENSORS | {"turned": WEIGHT.reshape(3, 4).T}
    write_safetensors(path, tensors, {"author": "someone"})
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == tensors.keys() and file.metadata() == {"author": "someone"}
        assert file.get_slice("b.eighth").get_dtype() == "F8_E4M3"
        wide = {name: file.get_tensor(name) for name in tensors if name not in EIGHTS}
    equal(wide, {name: tensor for name, tensor in tensors.items() if name not in EIGHTS})
    equal(dict(open_state(path)), tensors)
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(path.parent) == [path.name]


def test_a_file_is_written_whole_or_not_at_all(path):
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="a is complex64: known are float64, float32"):
        write_safetensors(path, {"a": np.zeros(2, np.complex64)})

    class Breaking(dict):
        count = 0

        def __getitem__(self, name):
            self.count += 1
            if self.count > 2 * len(self):
                raise KeyboardInterrupt
            return super().__getitem__(name)

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, Breaking(TENSORS))
    assert path.read_bytes() == b"before" and os.listdir(path.parent) == [path.name]


def test_one_tensor_is_copied_at_a_time(path):
    """The library would have all that are turned in memory once more, at once."""
    arrays = {f"{i}": np.zeros((512, 512), np.float32).T for i in range(16)}
    tracemalloc.start()
    write_safetensors(path, arrays)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * arrays["0"].nbytes
    equal(dict(open_state(path)), arrays)


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_reads_checkpoints(write, path):
    inner = {"w": tensor("0", (4, 3), (1, 4), numel=12), "epoch": 3, "nested": {"x": 1}}
    write(path, {"state_dict": inner, "optimizer": {"lr": 0.1}}, {"0": WEIGHT})
    state = open_state(path)
    equal(dict(state), {"w": WEIGHT.reshape(3, 4).T})
    assert state.place("w") == f"{path}: w" and state.shape("w") == (4, 3)
    write(path, {"w": tensor("0", (12,), (1,), numel=12)}, {"0": WEIGHT})
    equal(dict(open_state(path)), {"w": WEIGHT})


def test_a_tensor_is_read_alone(path):
    """And no page of the file stays mapped, which would count as memory of the process."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    arrays = {f"{i}": np.zeros((1024, 1024), np.float32) for i in range(16)}
    save_file(arrays, path)
    state, before = open_state(path), resident()
    tracemalloc.start()
    total = sum(float(state[name].sum()) for name in state)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 0 and peak < 2 * arrays["0"].nbytes
    assert resident() - before < 4 * arrays["0"].nbytes


def encoded(header, data=b"", length=None):
    """A safetensors file of that header (an object or text), whose length it may lie about."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def about(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


GOOD = encoded({"a": about(0, 4), "b": about(4, 12, (2,))}, bytes(12))
DEEP = b"[" * 100_000
LIBRARY = "is truncated, damaged or no safetensors file: .*"
DAMAGED = {
    "zero bytes": (b"", "is empty"),
    "one byte": (b"\0", "is neither safetensors nor a torch checkpoint"),
    "nothing but zeros": (bytes(100), "is neither safetensors nor a torch checkpoint"),
    "a web page": (b"<!DOCTYPE html><html>", "begins with b'<!DOCTYPE html><'"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
    "a zip of something else": (b"PK\x03\x04 and so on", "damaged or truncated"),
    "truncated in the header": (GOOD[:40], f"{LIBRARY}invalid header length"),
    "truncated in the data": (GOOD[:-3], f"{LIBRARY}file not fully covered"),
    "longer than its header says": (GOOD + b"more", f"{LIBRARY}file not fully covered"),
    "a header longer than any file": (
        encoded({"a": about(0, 4)}, bytes(4), length=2**63),
        f"{LIBRARY}header too large",
    ),
    "a header shorter than it is": (
        encoded({"a": about(0, 4)}, bytes(4), length=20),
        f"{LIBRARY}invalid JSON",
    ),
    "no JSON": (encoded(b"{'a': 1}"), f"{LIBRARY}invalid JSON"),
    "no text": (encoded(b'{"\xff": 1}'), f"{LIBRARY}invalid UTF-8"),
    "JSON without end": (encoded(b'{"a":' + DEEP + b"}"), f"{LIBRARY}recursion limit"),
    "no tensors": (encoded({"__metadata__": {"a": "b"}}), "holds no tensors"),
    "metadata of no object": (encoded({"__metadata__": 3}), f"{LIBRARY}expected a map"),
    "overlapping": (encoded({"a": about(0, 4), "b": about(2, 6)}, bytes(6)), f"{LIBRARY}`b`"),
    "a hole": (encoded({"a": about(0, 4), "b": about(8, 12)}, bytes(12)), f"{LIBRARY}`b`"),
    "a span that is too short": (encoded({"a": about(0, 4, (2, 3))}, bytes(4)), LIBRARY),
    "a shape that overflows": (encoded({"a": about(0, 0, (2**40, 2**40))}), f"{LIBRARY}overflow"),
    "a negative shape": (encoded({"a": about(0, 4, (-1, -1))}, bytes(4)), f"{LIBRARY}`-1`"),
    "a fraction": (encoded({"a": about(0, 4.0)}, bytes(4)), f"{LIBRARY}`4.0`"),
    "a span backwards": (encoded({"a": about(4, 0)}, bytes(4)), f"{LIBRARY}`a`"),
    "an unknown dtype": (encoded({"a": about(0, 4, dtype="F7")}, bytes(4)), f"{LIBRARY}`F7`"),
    "a dtype of no text": (encoded({"a": about(0, 4, dtype=[])}, bytes(4)), f"{LIBRARY}sequence"),
    "a tensor that is a number": (encoded({"a": 3}), f"{LIBRARY}integer `3`"),
    "a type that NumPy lacks": (
        encoded({"a": about(0, 4, (8,), "F4")}, bytes(4)),
        "a is of type F4: known are F64, F32",
    ),
}


def test_the_good_file_is_good(path):
    path.write_bytes(GOOD)
    assert open_state(path).keys() == {"a", "b"}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case, path):
    data, message = DAMAGED[case]
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        open_state(path)
    assert str(caught.value).startswith(str(path))


def test_every_truncation_is_seen(path):
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            open_state(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        open_state(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"is a directory"):
        open_state(tmp_path)


def test_a_file_that_shrinks_while_it_is_open(path):
    path.write_bytes(GOOD)
    state = open_state(path)
    path.write_bytes(GOOD[:-3])
    with pytest.raises(ValueError, match="has become shorter since it was opened"):
        state["b"]


def test_checkpoints_of_no_tensors(path):
    write_zip(path, {"epoch": 3}, {})
    with pytest.raises(ValueError, match="holds no tensors"):
        open_state(path)


def shard(folder, index, files):
    """Writes shards (file → tensors) and their index."""
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    weight_map = {key: name for name, tensors in files.items() for key in tensors}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / index


@pytest.mark.parametrize("stem, index", [
    ("model", "model.safetensors.index.json"),
    ("diffusion_pytorch_model", "diffusion_pytorch_model.safetensors.index.json"),
    ("diffusion_pytorch_model", "diffusion_pytorch_model.safetensors.index.fp16.json"),
    ("diffusion_pytorch_model", "diffusion_pytorch_model.safetensors.fp16.index.json"),
])  # fmt: skip
def test_reads_shards(stem, index, tmp_path):
    parts = {"1-of-2.safetensors": {"a": WEIGHT}, "2-of-2.safetensors": {"b": WEIGHT[:3]}}
    shard(tmp_path, index, parts)
    state = open_shards(tmp_path, stem)
    equal(dict(state), {"a": WEIGHT, "b": WEIGHT[:3]})
    assert state.place("b") == f"{tmp_path / '2-of-2.safetensors'}: b"


def test_prefers_safetensors_and_full_precision(tmp_path):
    """Each file that is added comes before those that were there."""
    for name in (
        "pytorch_model.fp16.bin",
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "model.safetensors",
    ):
        if name.endswith("bin"):
            write_zip(tmp_path / name, {name: tensor("0", (12,), (1,), numel=12)}, {"0": WEIGHT})
        else:
            save_file({name: WEIGHT}, tmp_path / name)
        assert list(open_shards(tmp_path, "model")) == [name]


def test_shards_that_are_not_there(tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"no weights in .*found \['flax_model.msgpack'\]"):
        open_shards(tmp_path, "model")
    with pytest.raises(FileNotFoundError, match="found no such folder"):
        open_shards(tmp_path / "nowhere", "model")


def test_damaged_indices_are_named(tmp_path):
    index = shard(tmp_path, "model.safetensors.index.json", {"one": {"a": WEIGHT}})

    def told(error, message, weight_map=None):
        if weight_map is not None:
            index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(error, match=message) as caught:
            open_shards(tmp_path, "model")
        assert str(tmp_path) in str(caught.value)

    told(FileNotFoundError, "names the shard two, which is missing", {"a": "one", "b": "two"})
    told(ValueError, "says that b is in one, where it is not", {"a": "one", "b": "one"})
    for name in ("../one", "/etc/passwd", "..", "a\\b", 3, ""):
        told(ValueError, "which is no name of a file beside it", {"a": name})
    told(ValueError, "is an index of no tensors", {})
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map"'):
        index.write_text(text)
        told(ValueError, "is no index of shards")
    index.write_bytes(b"\xff\xfe{}")
    told(ValueError, "is no index of shards")
