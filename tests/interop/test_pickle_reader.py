"""Checkpoints written opcode by opcode: what a torch file holds, what a hostile one may try."""

import io
import pickle
import struct
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from ldm_jax.interop import pickle_reader
from ldm_jax.interop.pickle_reader import read_pickle


class Global(NamedTuple):
    module: str
    name: str


class Call(NamedTuple):
    function: Any
    args: tuple
    state: Any = None


class Stored(NamedTuple):
    """A persistent id: where a tensor's elements lie."""

    storage_type: str
    key: str
    numel: int


def emit(x) -> bytes:
    """Protocol 2 opcodes that leave `x` on the stack."""
    if isinstance(x, Global):
        return f"c{x.module}\n{x.name}\n".encode()
    if isinstance(x, Call):
        state = b"" if x.state is None else emit(x.state) + b"b"
        return emit(x.function) + emit(x.args) + b"R" + state
    if isinstance(x, Stored):
        kind = Global("torch", x.storage_type)
        return emit(("storage", kind, x.key, "cuda:0", x.numel)) + b"Q"
    if isinstance(x, dict):
        return b"}(" + b"".join(emit(k) + emit(v) for k, v in x.items()) + b"u"
    if isinstance(x, list):
        return b"](" + b"".join(map(emit, x)) + b"e"
    if isinstance(x, tuple):
        return b"(" + b"".join(map(emit, x)) + b"t"
    return pickle.dumps(x, 2)[2:-1]


def program(x) -> bytes:
    return b"\x80\x02" + emit(x) + b"."


def tensor(key, size, stride, *, numel, offset=0, kind="FloatStorage"):
    storage = Stored(kind, key, numel)
    args = (storage, offset, size, stride, False, Call(Global("collections", "OrderedDict"), ()))
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), args)


def write_zip(path, tree, storages, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", tree if isinstance(tree, bytes) else program(tree))
        archive.writestr("archive/byteorder", b"little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(data).tobytes())
    return path


def write_legacy(path, tree, storages):
    out = io.BytesIO()
    for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, tree, list(storages)):
        out.write(program(header))
    for data in storages.values():
        out.write(struct.pack("<q", data.size) + data.tobytes())
    path.write_bytes(out.getvalue())
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pth"


WEIGHT = np.arange(12, dtype=np.float32)


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_reads_tensors_and_everything_around_them(path, write):
    half = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    ordered = Global("collections", "OrderedDict")
    kernel = tensor("0", (3, 4), (4, 1), numel=12)
    tree = {
        "state_dict": Call(ordered, ([["w", kernel], ["same", kernel]],), {"_metadata": {}}),
        "transposed": tensor("0", (4, 3), (1, 4), numel=12),
        "every_other": tensor("0", (2, 2), (8, 2), numel=12, offset=1),
        "expanded": tensor("0", (3, 2), (0, 1), numel=12, offset=10),
        "scalar": tensor("0", (), (), numel=12, offset=7),
        "empty": tensor("0", (0, 4), (4, 1), numel=12),
        "parameter": Call(Global("torch._utils", "_rebuild_parameter"), (kernel, True, {})),
        "half": tensor("1", (2,), (1,), numel=2, kind="BFloat16Storage"),
        "steps": tensor("2", (1,), (1,), numel=1, kind="LongStorage"),
        "rest": [1, 2.5, None, True, "text", (3,)],
        "size": Call(Global("torch", "Size"), ([2, 3],)),
    }
    read = read_pickle(write(path, tree, {"0": WEIGHT, "1": half, "2": np.array([7])}))

    grid = WEIGHT.reshape(3, 4)
    assert list(read) == list(tree)
    np.testing.assert_array_equal(read["state_dict"]["w"], grid)
    np.testing.assert_array_equal(read["state_dict"]["same"], grid)
    np.testing.assert_array_equal(read["transposed"], grid.T)
    np.testing.assert_array_equal(read["every_other"], [[1, 3], [9, 11]])
    np.testing.assert_array_equal(read["expanded"], [[10, 11]] * 3)
    assert read["scalar"].shape == () and read["scalar"] == 7
    assert read["empty"].shape == (0, 4)
    np.testing.assert_array_equal(read["parameter"], grid)
    assert read["half"].dtype == ml_dtypes.bfloat16 and list(read["half"]) == [1.5, -2.0]
    assert read["steps"].dtype == np.int64 and read["steps"] == [7]
    assert read["rest"] == [1, 2.5, None, True, "text", (3,)] and read["size"] == (2, 3)


def test_reads_what_lightning_leaves_beside_the_weights(path):
    callback = Global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    number = Call(Global("_codecs", "encode"), ("\x00\x00\x00\x00\x00\x00\x04@", "latin1"))
    dtype = Call(Global("numpy", "dtype"), ("f8", False, True), (3, "<", None, -1))
    scalar = Call(Global("numpy.core.multiarray", "scalar"), (dtype, number))
    read = read_pickle(write_zip(path, {"callbacks": {callback: {"score": scalar}}}, {}))
    assert read == {
        "callbacks": {
            "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": {"score": 2.5}
        }
    }


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize(
    "name", ["os system", "builtins eval", "torch load", "numpy load", "torch._utils __import__"]
)
def test_refuses_a_call_by_name(path, write, name):
    module, function = name.split()
    write(path, {"state_dict": Call(Global(module, function), ("touch owned",))}, {})
    with pytest.raises(ValueError, match=rf"model\.pth: refuses to call {module}\.{function}"):
        read_pickle(path)


def test_refuses_a_bare_hostile_pickle(path):
    path.write_bytes(program(Call(Global("os", "system"), ("touch owned",))))
    with pytest.raises(ValueError, match=r"refuses to call os\.system"):
        read_pickle(path)


def test_setting_attributes_changes_nothing(path):
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    state = (None, {"__defaults__": (1, 2, 3, 4), "owned": True})
    read_pickle(
        write_zip(
            path, b"\x80\x02}(" + emit("f") + emit(1) + emit(rebuild) + emit(state) + b"b0u.", {}
        )
    )
    assert not hasattr(pickle_reader._rebuild_tensor, "owned")


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (tensor("0", (3, 5), (5, 1), numel=12), "needs 15 of 12"),
        (tensor("0", (3, 4), (4, 1), numel=12, offset=1), "needs 13 of 12"),
        (tensor("0", (2, 2), (2**62, 1), numel=12), "needs"),
        (tensor("0", (2,), (-1,), numel=12, offset=1), "strides"),
        (tensor("0", (2,), (1,), numel=12, offset=-1), "offset -1"),
        (tensor("0", (2, 2), (1,), numel=12), "strides"),
        (tensor("0", (2**40, 2**40), (0, 0), numel=12), "larger than the whole file"),
        (tensor("0", (2,), (1,), numel=13), "48 bytes, its tensors expect 52"),
        (tensor("0", (2,), (1,), numel=-1), "makes no sense"),
        (tensor("9", (2,), (1,), numel=12), "has no member archive/data/9"),
        (tensor("../byteorder", (2,), (1,), numel=12), "has no member"),
    ],
)
def test_refuses_tensors_that_lie_about_their_bytes(path, lie, message):
    write_zip(path, {"w": lie}, {"0": WEIGHT})
    with pytest.raises(ValueError, match=f"model.pth: .*{message}"):
        read_pickle(path)


def test_refuses_a_legacy_storage_of_another_length(path):
    write_legacy(path, {"w": tensor("0", (2,), (1,), numel=13)}, {"0": WEIGHT})
    with pytest.raises(ValueError, match="storage 0, 13 elements, is cut short or mislabelled"):
        read_pickle(path)


@pytest.mark.parametrize("other", [{"kind": "IntStorage", "numel": 12}, {"numel": 6}])
def test_refuses_one_storage_described_in_two_ways(path, other):
    tree = {"a": tensor("0", (2,), (1,), numel=12), "b": tensor("0", (2,), (1,), **other)}
    with pytest.raises(ValueError, match="storage 0 is described in two ways"):
        read_pickle(write_legacy(path, tree, {"0": WEIGHT}))


def test_refuses_a_zip_bomb(path):
    big = np.zeros(10**6, np.float32)
    tree = {"w": tensor("0", (1,), (1,), numel=big.size)}
    write_zip(path, tree, {"0": big}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="archive/data/0 unpacks to 4000000 bytes"):
        read_pickle(path)


def test_refuses_overlapping_members(path):
    write_zip(path, {"w": 1}, {"0": WEIGHT})
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    struct.pack_into("<II", data, directory + 20, 10**6, 10**6)  # the first entry's two sizes
    path.write_bytes(data)
    with pytest.raises(ValueError, match="overlap, or claim more bytes"):
        read_pickle(path)


def test_refuses_a_container_inside_itself(path):
    with pytest.raises(ValueError, match="contains itself"):
        read_pickle(write_zip(path, b"\x80\x02}q\x09(" + emit("me") + b"h\x09u.", {}))


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_every_truncation_is_a_clear_error(path, write):
    whole = write(path, {"w": tensor("0", (3, 4), (4, 1), numel=12)}, {"0": WEIGHT}).read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.pth: "):
            read_pickle(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x00", "is not a torch checkpoint"),
        (b"hello world", "is not a torch checkpoint"),
        (program({"a": 1}), "not one that torch.save wrote"),
        (b"PK\x03\x04", "damaged or truncated"),
    ],
)
def test_other_files_are_told_apart(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_pickle(path)


def test_wants_a_dict(path):
    with pytest.raises(ValueError, match="holds a list"):
        read_pickle(write_zip(path, [1], {}))


def test_missing_file(path):
    with pytest.raises(FileNotFoundError):
        read_pickle(path)
