"""Checkpoints written opcode by opcode: what a torch file holds, what a hostile one may try."""

import argparse
import array
import collections
import datetime
import decimal
import enum
import fractions
import functools
import io
import logging
import os
import pathlib
import pickle
import pickletools
import random
import re
import struct
import tracemalloc
import typing
import uuid
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from ldm_jax.interop import pickle_reader
from ldm_jax.interop.pickle_reader import read_checkpoint


class Global(NamedTuple):
    module: str
    name: str


class Call(NamedTuple):
    function: Any
    args: tuple
    state: Any = None


class Scripted(NamedTuple):
    """A module of TorchScript: an object of a class without a constructor, and its state."""

    name: str
    state: Any


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
    if isinstance(x, Scripted):
        return emit(Global("__torch__", x.name)) + b")\x81" + emit(x.state) + b"b"
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


def read(path):
    """Every tensor, read."""
    return {name: stored.read() for name, stored in read_checkpoint(path).items()}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_reads_tensors_of_every_form(path, write):
    half = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    kernel = tensor("0", (3, 4), (4, 1), numel=12)
    plain = Global("torch._utils", "_rebuild_tensor_v2")
    state = {"named": "x"}
    typed = (plain, Global("torch.nn.parameter", "Parameter"), kernel.args, state)
    tree = {
        "w": kernel,
        "same": kernel,
        "transposed": tensor("0", (4, 3), (1, 4), numel=12),
        "every_other": tensor("0", (2, 2), (8, 2), numel=12, offset=1),
        "expanded": tensor("0", (3, 2), (0, 1), numel=12, offset=10),
        "scalar": tensor("0", (), (), numel=12, offset=7),
        "empty": tensor("0", (0, 4), (4, 1), numel=12),
        "parameter": Call(Global("torch._utils", "_rebuild_parameter"), (kernel, True, {})),
        "with_attributes": Call(Global("torch._tensor", "_rebuild_from_type_v2"), typed),
        "half": tensor("1", (2,), (1,), numel=2, kind="BFloat16Storage"),
        "steps": tensor("2", (1,), (1,), numel=1, kind="LongStorage"),
        "rest": [1, 2.5, None, True, "text", (3,)],
        "size": Call(Global("torch", "Size"), ([2, 3],)),
    }
    storages = {"0": WEIGHT, "1": half, "2": np.array([7])}
    write(
        path, {"state_dict": tree, "epoch": 3, "other": tensor("0", (1,), (1,), numel=12)}, storages
    )
    found = read(path)

    grid = WEIGHT.reshape(3, 4)
    assert list(found) == list(tree)[:-2]
    for name in ("w", "same", "parameter", "with_attributes"):
        np.testing.assert_array_equal(found[name], grid)
    np.testing.assert_array_equal(found["transposed"], grid.T)
    np.testing.assert_array_equal(found["every_other"], [[1, 3], [9, 11]])
    np.testing.assert_array_equal(found["expanded"], [[10, 11]] * 3)
    assert found["scalar"].shape == () and found["scalar"] == 7
    assert found["empty"].shape == (0, 4)
    assert found["half"].dtype == ml_dtypes.bfloat16 and list(found["half"]) == [1.5, -2.0]
    assert found["steps"].dtype == np.int64 and found["steps"] == [7]
    stored = read_checkpoint(path)["transposed"]
    assert (stored.shape, stored.dtype) == ((4, 3), np.float32)

    pairs = Call(Global("collections", "OrderedDict"), ([["w", kernel]],), {"_metadata": {}})
    np.testing.assert_array_equal(read(write(path, pairs, {"0": WEIGHT}))["w"], grid)


def test_a_tensor_is_read_alone(path):
    weights = {str(i): np.zeros((256, 256), np.float32) for i in range(16)}
    for write in (write_zip, write_legacy):
        write(path, {f"w{i}": tensor(i, (256, 256), (256, 1), numel=256**2) for i in weights}, {
            i: w.reshape(-1) for i, w in weights.items()
        })  # fmt: skip
        tracemalloc.start()
        total = sum(float(stored.read().sum()) for stored in read_checkpoint(path).values())
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert total == 0 and peak < 4 * weights["0"].nbytes


class Custom:
    """Users' own classes, which cannot be imported here."""

    def __init__(self, value):
        self.value, self.me = value, self


class Options(dict):
    """A dict of another class."""


class Level(enum.Enum):
    HIGH = 1


Point = collections.namedtuple("Point", "x y")
BESIDE = {
    "arguments": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("/data"), nested={"a": [1]}),
    "a path": pathlib.Path("model.ckpt"),
    "a date": datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
    "a duration": [datetime.timedelta(3), datetime.date(2024, 1, 2), datetime.time(1)],
    "NumPy numbers": (np.float64(2.5), np.int64(3), np.dtype("f4"), np.bool_(True)),
    "a NumPy array": np.arange(3.0),
    "random states": (np.random.default_rng(0), random.Random(0), np.random.RandomState(0)),
    "an object": Custom([1, Custom(2)]),
    "a dict of another class": Options(a=Options(b=1)),
    "an enumeration": {Level.HIGH: Level.HIGH},
    "a tuple with names": Point(1, 2),
    "collections": (collections.deque([1]), collections.Counter("ab"), {1, 2}, frozenset("a")),
    "other numbers": (decimal.Decimal("0.1"), fractions.Fraction(1, 3), 1j, uuid.UUID(int=3)),
    "expressions": (re.compile("a+"), typing.Literal["a"], dict[str, list[int]], slice(1)),
    "functions that are not called": (os.system, exec, Custom, functools.partial(print, end="")),
    "a logger": logging.getLogger("train"),
    "an error": ValueError("once"),
    "an array": array.array("f", [1.0]),
    "bytes": (b"a\xff", bytearray(b"b")),
}


def opcodes(x, protocol):
    """What leaves `x` on the stack, without what begins and ends a pickle."""
    whole = pickle.dumps(x, protocol)
    starts = [(code.name, at) for code, _, at in pickletools.genops(whole)]
    spans = zip(starts, [at for _, at in starts[1:]], strict=False)
    return b"".join(whole[at:end] for (name, at), end in spans if name not in ("PROTO", "FRAME"))


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("case", BESIDE)
def test_what_stands_beside_the_weights_is_left_alone(path, case, protocol):
    beside = opcodes({"epoch": 1, "extra": BESIDE[case], "again": [BESIDE[case]]}, protocol)
    weights = emit({"w": tensor("0", (12,), (1,), numel=12)})
    tree = b"}(X\x06\0\0\0beside" + beside + emit("state_dict") + weights + b"u."
    found = read(write_zip(path, b"\x80\x05" + tree, {"0": WEIGHT}))
    np.testing.assert_array_equal(found.pop("w"), WEIGHT)
    assert not found


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize(
    "name",
    [
        *("os system", "posix system", "nt system", "os popen", "subprocess Popen", "sys exit"),
        *(
            "builtins eval",
            "builtins exec",
            "builtins getattr",
            "builtins open",
            "__builtin__ eval",
        ),
        *("builtins __import__", "importlib import_module", "runpy run_path", "shutil rmtree"),
        *("socket socket", "pickle loads", "_pickle loads", "ctypes CDLL", "operator methodcaller"),
        *("types FunctionType", "webbrowser open", "commands getoutput", "pip main"),
        *("argparse _os.system", "pathlib os.system", "random _os.system", "time sleep"),
        *("typing get_type_hints", "collections namedtuple", "builtins iter"),
        *("torch load", "torch.hub load", "numpy load", "torch._utils __import__", "a.os system"),
    ],
)
def test_refuses_a_call_that_makes_no_data(path, write, name):
    module, function = name.split()
    call = Call(Global(module, function), ("touch owned",))
    refused = rf"model\.pth: refuses to call {module}\.{function}"
    weights = {"w": tensor("0", (12,), (1,), numel=12)}
    for tree in ({"state_dict": call}, {"state_dict": weights, "beside": [{"x": call}]}):
        with pytest.raises(ValueError, match=refused):
            read_checkpoint(write(path, tree, {"0": WEIGHT}))


def test_refuses_calls_in_every_way_that_pickle_has(path):
    argument = emit("touch owned")
    for program in (
        b"(" + argument + b"ios\nsystem\n",  # INST
        b"(cos\nsystem\n" + argument + b"o",  # OBJ
        emit("os") + emit("system") + b"\x93(" + argument + b"tR",  # STACK_GLOBAL
        emit("torch") + emit("os.system") + b"\x93(" + argument + b"tR",  # a name with a dot
    ):
        with pytest.raises(ValueError, match=r"refuses to call (torch\.)?os\.system"):
            read_checkpoint(write_zip(path, b"\x80\x04}(" + emit("x") + program + b"u.", {}))


def test_a_tensor_that_an_unknown_class_makes_is_refused(path):
    kernel = tensor("0", (12,), (1,), numel=12)
    for made in (
        Call(Global("torch._utils", "_rebuild_qtensor"), kernel.args),
        Call(Global("some.where", "Packed"), (kernel, 4)),
        Call(
            Global("torch._tensor", "_rebuild_from_type_v2"),
            (kernel.function, Global("some.where", "Packed"), kernel.args, {}),
        ),
    ):
        with pytest.raises(
            ValueError, match=r"model\.pth: w is a tensor that .* makes, which we do"
        ):
            read_checkpoint(write_zip(path, {"state_dict": {"w": made}}, {"0": WEIGHT}))
        # Outside of the weights it is nobody's business.
        tree = {"state_dict": {"w": kernel}, "optimizer": {"state": made}}
        assert list(read(write_zip(path, tree, {"0": WEIGHT}))) == ["w"]
    named = [[Call(Global("some.where", "Name"), ("w",)), kernel]]
    tree = Call(Global("collections", "OrderedDict"), (named,))
    with pytest.raises(ValueError, match=r"a tensor has a some\.where\.Name for a name"):
        read_checkpoint(write_zip(path, tree, {"0": WEIGHT}))


def test_the_weights_are_in_the_only_dict_of_tensors(path):
    kernel = tensor("0", (12,), (1,), numel=12)
    adam = {"state": {0: {"exp_avg": kernel}}, "param_groups": [{"lr": 0.1}]}
    storages = {"0": WEIGHT}
    for tree in (
        {"model": {"w": kernel}, "optimizer": adam, "epoch": 3},
        {"w": kernel, "args": {}},
    ):
        assert list(read(write_zip(path, tree, storages))) == ["w"]
    both = {"model": {"w": kernel}, "ema": {"w": kernel}}
    assert read(write_zip(path, both, storages)) == {}
    assert list(read(write_zip(path, both | {"state_dict": {"v": kernel}}, storages))) == ["v"]


def test_a_module_of_torchscript_is_its_tensors_by_name(path):
    """As OpenAI published CLIP: modules in modules, and plain values beside tensors."""
    inner = Scripted("nn.Linear", {"weight": tensor("0", (3, 4), (4, 1), numel=12), "training": 1})
    blocks = Scripted("nn.ModuleList", {"0": inner, "1": Scripted("nn.GELU", {"training": 0})})
    own = {"visual": blocks, "scale": tensor("1", (2,), (1,), numel=2), "size": 224, "name": "x"}
    write_zip(path, Scripted("clip.CLIP", own), {"0": WEIGHT, "1": WEIGHT[:2]})
    found = read(path)
    assert found.keys() == {"visual.0.weight", "scale"}
    np.testing.assert_array_equal(found["visual.0.weight"], WEIGHT.reshape(3, 4))
    np.testing.assert_array_equal(found["scale"], WEIGHT[:2])


def test_modules_of_torchscript_in_each_other_without_end(path):
    state = tensor("0", (3, 4), (4, 1), numel=12)
    for _ in range(40):
        state = Scripted("nn.Module", {"a": state})
    write_zip(path, state, {"0": WEIGHT})
    with pytest.raises(ValueError, match="modules in modules without end"):
        read(path)


def test_a_whole_module_is_no_dict_of_tensors(path):
    module = b"\x80\x02csome.where\nNet\n)\x81}b."
    with pytest.raises(ValueError, match=r"holds a some\.where\.Net, where a dict of tensors was"):
        read_checkpoint(write_zip(path, module, {}))


def test_damage_that_reading_finds_is_named(path):
    data = bytearray(
        write_zip(path, {"w": tensor("0", (12,), (1,), numel=12)}, {"0": WEIGHT}).read_bytes()
    )
    data[data.index(WEIGHT.tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.pth: damaged or truncated"):
        read(path)


def test_refuses_a_bare_hostile_pickle(path):
    path.write_bytes(program(Call(Global("os", "system"), ("touch owned",))))
    with pytest.raises(ValueError, match=r"refuses to call os\.system"):
        read_checkpoint(path)


def test_setting_attributes_changes_nothing(path):
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    state = (None, {"__defaults__": (1, 2, 3, 4), "owned": True})
    read_checkpoint(
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
        read_checkpoint(path)


def test_refuses_a_legacy_storage_of_another_length(path):
    write_legacy(path, {"w": tensor("0", (2,), (1,), numel=13)}, {"0": WEIGHT})
    with pytest.raises(ValueError, match="storage 0, 13 elements, is cut short or mislabelled"):
        read_checkpoint(path)


@pytest.mark.parametrize("other", [{"kind": "IntStorage", "numel": 12}, {"numel": 6}])
def test_refuses_one_storage_described_in_two_ways(path, other):
    tree = {"a": tensor("0", (2,), (1,), numel=12), "b": tensor("0", (2,), (1,), **other)}
    with pytest.raises(ValueError, match="storage 0 is described in two ways"):
        read_checkpoint(write_legacy(path, tree, {"0": WEIGHT}))


def test_refuses_a_zip_bomb(path):
    big = np.zeros(10**6, np.float32)
    tree = {"w": tensor("0", (1,), (1,), numel=big.size)}
    write_zip(path, tree, {"0": big}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="archive/data/0 unpacks to 4000000 bytes"):
        read_checkpoint(path)


def test_refuses_overlapping_members(path):
    write_zip(path, {"w": 1}, {"0": WEIGHT})
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    struct.pack_into("<II", data, directory + 20, 10**6, 10**6)  # the first entry's two sizes
    path.write_bytes(data)
    with pytest.raises(ValueError, match="overlap, or claim more bytes"):
        read_checkpoint(path)


def test_a_container_inside_itself_is_no_trouble(path):
    assert read(write_zip(path, b"\x80\x02}q\x09(" + emit("me") + b"h\x09u.", {})) == {}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_every_truncation_is_a_clear_error(path, write):
    whole = write(path, {"w": tensor("0", (3, 4), (4, 1), numel=12)}, {"0": WEIGHT}).read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.pth: "):
            read_checkpoint(path)


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
        read_checkpoint(path)


def test_wants_a_dict(path):
    with pytest.raises(ValueError, match="holds a list"):
        read_checkpoint(write_zip(path, [1], {}))


def test_missing_file(path):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(path)
