"""Pickles of arrays, and jax-fid's Inception-v3 among them; what calls anything else is refused.

`parity/test_extractors.py` compares the features of such a file with those of the `.pth`.
"""

import collections
import os
import pickle
import types

import jax
import numpy as np
import pytest

from ldm_jax.interop.files import open_state, write_safetensors
from ldm_jax.metrics.array_pickle import is_array_pickle, open_array_pickle
from ldm_jax.metrics.extractors import load_extractor
from ldm_jax.metrics.inception import JAX_KEY, KEY, in_torch_names, read_inception
from ldm_jax.metrics.moments import moments_of


def written(path, tree, protocol=4):
    path.write_bytes(pickle.dumps(tree, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_protocol(tmp_path, protocol):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.random.default_rng(0).normal(size=(3, 4))),
        "big_endian": np.arange(3, dtype=">f4"),
        "half": np.float16([[0.5]]),
        "none": np.zeros((0, 3), np.int64),
    }
    tree = collections.OrderedDict(x=arrays, y={"z": arrays["a"] + 1, "unused": None})
    path = written(tmp_path / "w.pickle", tree, protocol)
    assert is_array_pickle(path)
    found = open_array_pickle(path)
    assert set(found) == {f"x/{name}" for name in arrays} | {"y/z"}
    for name, array in arrays.items():
        assert found.shape(f"x/{name}") == array.shape
        assert found.dtype(f"x/{name}") == array.dtype
        np.testing.assert_array_equal(found[f"x/{name}"], array)
    assert found.place("y/z") == f"{path}: y/z"


class Calls:
    """Its pickle calls a function with arguments."""

    def __init__(self, function, *given):
        self.call = function, given

    def __reduce__(self):
        return self.call


OBJECTS = np.array([{}, []], object)
REFUSED = {
    "a call": (
        Calls(os.system, "touch /tmp/x"),
        r"refuses to call (posix|nt).system: a file of ar",
    ),
    "a call of ours": (Calls(moments_of, []), "refuses to call ldm_jax.metrics.moments.moments_of"),
    "eval": ({"a": Calls(eval, "1")}, "refuses to call builtins.eval"),
    "a class": (types.SimpleNamespace(a=1), "refuses to call types.SimpleNamespace"),
    "objects": ({"a": OBJECTS}, "an array of 'O8', where numbers were expected"),
    "no arrays": ({"a": {}}, "holds no arrays"),
    "a list": ({"a": [np.zeros(1)]}, "a holds a list, where arrays were expected"),
    "a key": ({"a": {3: np.zeros(1)}}, "a has a key int, not a text"),
    "an array's size": (
        Calls(np._core.numeric._frombuffer, b"123", np.dtype("f4"), (2,), "C"),
        r"holds 3 bytes for an array of float32 \(2,\)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(tmp_path, what):
    tree, message = REFUSED[what]
    path = written(tmp_path / "w.pickle", tree)
    with pytest.raises(ValueError, match=message) as error:
        open_array_pickle(path)
    assert str(error.value).startswith(str(path))
    with pytest.raises(ValueError, match=message):
        load_extractor(path)


def test_damaged_files(tmp_path):
    whole = pickle.dumps({"a": np.zeros(100)}, 4)
    path = tmp_path / "w.pickle"
    for size in (2, 40, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged or truncated"):
            open_array_pickle(path)
    deep = np.zeros(1)
    for _ in range(30):
        deep = {"a": deep}
    with pytest.raises(ValueError, match="holds a dict, where arrays were expected"):
        open_array_pickle(written(path, deep))
    (tmp_path / "torch.pth").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80")
    assert not is_array_pickle(tmp_path / "torch.pth")
    assert not is_array_pickle(tmp_path / "nothing")


def inception(classes=1008):
    """A few layers, as torch names and keeps them, and as jax-fid does."""
    random, torch, flax = np.random.default_rng(0), {}, {}
    for path in ("Conv2d_1a_3x3", "Mixed_6b.branch7x7_2", KEY.removesuffix(".conv.weight")):
        kernel = random.normal(size=(4, 3, 1, 7)).astype(np.float32)
        norm = [1 + random.random(4, np.float32) for _ in range(4)]
        torch[f"{path}.conv.weight"] = kernel
        for name, array in zip(
            ("weight", "bias", "running_mean", "running_var"), norm, strict=True
        ):
            torch[f"{path}.bn.{name}"] = array
        layer = {
            "conv": {"kernel": kernel.transpose(2, 3, 1, 0)},
            "bn": dict(zip(("scale", "bias", "mean", "var"), norm, strict=True)),
        }
        block, _, branch = path.partition(".")
        flax.setdefault(block, {}).update({branch: layer} if branch else layer)
    torch["fc.weight"] = random.normal(size=(classes, 2048)).astype(np.float32)
    torch["fc.bias"] = np.zeros(classes, np.float32)
    flax["fc"] = {"kernel": torch["fc.weight"].T, "bias": torch["fc.bias"]}
    return torch, flax


def test_the_pickle_of_jax_fid_holds_the_same_network(tmp_path):
    torch, flax = inception()
    found = open_array_pickle(written(tmp_path / "w.pickle", flax))
    assert JAX_KEY in found
    renamed = in_torch_names(found)
    assert set(renamed) == set(torch)
    assert all(renamed.shape(name) == torch[name].shape for name in torch)
    write_safetensors(tmp_path / "w.safetensors", torch)
    ours, theirs = read_inception(renamed), read_inception(open_state(tmp_path / "w.safetensors"))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with pytest.raises(ValueError, match="w.pickle does not fit the network that its names announ"):
        load_extractor(tmp_path / "w.pickle")
    del flax["fc"]  # which that code does not use
    params = read_inception(in_torch_names(open_array_pickle(written(tmp_path / "w", flax))))
    assert params["fc"]["kernel"].shape == (2048, 1008)
    _, flax = inception(classes=1000)
    with pytest.raises(ValueError, match="not the Inception-v3 of FID, which has 1008 classes"):
        load_extractor(written(tmp_path / "w.pickle", flax))
