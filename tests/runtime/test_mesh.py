"""Meshes of devices, and how arrays are split over them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from ldm_jax.runtime import mesh as meshes
from ldm_jax.runtime.mesh import (
    check_batch,
    make_mesh,
    part_of_batch,
    put_batch,
    spread,
    state_shardings,
    to_host,
)


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def specs(shardings):
    return jax.tree.map(lambda s: tuple(s.spec), shardings)


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"data": 3}, "mesh data=3, fsdp=1, tensor=1 does not fit 8 devices: .* must be 8"),
        ({"data": -1, "fsdp": 3}, "mesh data=-1, fsdp=3, tensor=1 does not fit 8 devices"),
        ({"data": 2, "fsdp": 2, "tensor": 4}, "data=2, fsdp=2, tensor=4 does not fit 8 devices"),
        ({"data": -1, "tensor": -1}, "sizes are 1 or more, and one may be -1, the rest"),
        ({"data": 0}, "mesh data=0, .* sizes are 1 or more"),
        ({"model": 2}, "mesh.model: the axes of a mesh are data, fsdp, tensor"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(axes)


def test_the_rest_of_the_devices():
    assert dict(make_mesh({}).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh({"data": 2, "fsdp": -1, "tensor": 2}).shape)["fsdp"] == 2


@pytest.mark.parametrize(
    "batch, advice",
    [(6, "4 or 8"), (10, "8 or 12"), (3, "4"), (0, "4"), (-4, "4"), (17, "16 or 20")],
)
def test_a_batch_that_does_not_divide_is_refused(batch, advice):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    check_batch(mesh, 12)
    message = f"batch_size={batch} .* data=2, fsdp=2: use a multiple of 4, such as {advice}$"
    with pytest.raises(ValueError, match=message):
        check_batch(mesh, batch)


def test_large_parameters_split_along_their_largest_divisible_dimension():
    shapes = {"large": array(3, 256, 512), "small": array(64), "odd": array(513, 257)}
    assert specs(state_shardings(make_mesh({"fsdp": 4}), shapes)) == {
        "large": (None, None, "fsdp"),
        "small": (),
        "odd": (),
    }


def test_pairs_of_layers_split_outputs_then_inputs():
    params = {
        "unet": {
            "attn1": {"to_q": {"kernel": array(512, 256)}, "to_out": {"kernel": array(256, 512)}},
            "in_layers_2": {"kernel": array(3, 3, 64, 128), "bias": array(128)},
            "out_layers_3": {"kernel": array(3, 3, 128, 64)},
            "odd": {"to_q": {"kernel": array(512, 255)}},
        }
    }
    found = specs(state_shardings(make_mesh({"fsdp": 2, "tensor": 2}), params))["unet"]
    assert found["attn1"] == {
        "to_q": {"kernel": ("fsdp", "tensor")},
        "to_out": {"kernel": ("tensor", "fsdp")},
    }
    assert found["in_layers_2"] == {"kernel": (None, None, "fsdp", "tensor"), "bias": ()}
    assert found["out_layers_3"] == {"kernel": (None, None, "tensor", "fsdp")}
    assert found["odd"]["to_q"]["kernel"] == ("fsdp",), "a rule of ours that does not fit is left"


def test_a_rule_of_the_config_comes_first():
    params = {"unet": {"a": {"kernel": array(512, 256)}, "b": {"kernel": array(512, 256)}}}
    rules = (("unet/a/", ("", "fsdp+tensor")), ("unet/b/", ()), ("unet", ("data",)))
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    found = specs(state_shardings(mesh, params, rules=rules))
    assert found == {
        "unet": {"a": {"kernel": (None, ("fsdp", "tensor"))}, "b": {"kernel": (None, None)}}
    }


@pytest.mark.parametrize(
    "axes, message",
    [
        (("fsdp",), r"unet/a has the shape \[6, 9\], and fsdp of the mesh, 4, does not divide 9"),
        (("model",), "no axis 'model'; a mesh has data, fsdp, tensor"),
        ((None, None, "fsdp"), r"\[6, 9\], and its rule .* at most as many dimensions"),
        (("fsdp", "fsdp"), "each axis once"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        state_shardings(make_mesh({"fsdp": 4}), {"unet": {"a": array(6, 9)}}, rules=[("a", axes)])


def test_moments_and_averages_are_split_like_their_parameters():
    params = {"unet": {"to_q": {"kernel": array(512, 256)}, "bias": array(256)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {"params": params, "ema": params, "opt": jax.eval_shape(optimizer.init, params)}
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    found = state_shardings(mesh, state, params, [("kernel$", ("fsdp", "data"))])
    by_path = jax.tree_util.tree_leaves_with_path(found)
    kernels = [s.spec for path, s in by_path if "kernel" in jax.tree_util.keystr(path)]
    assert kernels == [P("fsdp", "data")] * 4  # parameters, average, two moments
    assert {tuple(s.spec) for path, s in by_path if "kernel" not in jax.tree_util.keystr(path)} == {
        ()
    }


def test_batches_are_split_over_data_and_fsdp_and_spread_when_they_divide():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rows = np.arange(24.0).reshape(8, 3)
    assert part_of_batch() == (0, 1)
    with jax.set_mesh(mesh):
        assert part_of_batch() == (0, 1)
        batch = put_batch(mesh, {"x": rows})["x"]
        shares = spread({"x": rows})["x"]
        assert spread({"x": rows[:6]})["x"].shape == (6, 3)
        assert isinstance(spread({"x": rows[:6]})["x"], np.ndarray), "left as it is"
    for split in (batch, shares):
        assert {s.data.shape for s in split.addressable_shards} == {(2, 3)}
        np.testing.assert_array_equal(to_host(split), rows)


class Device:
    def __init__(self, process):
        self.process_index = process


class Placed:
    """A mesh of devices of several processes, seen from process 0."""

    def __init__(self, processes, tensor=1):
        self.devices = np.array([Device(p) for p in processes], object)
        self.shape = {"tensor": tensor}


@pytest.mark.parametrize(
    "processes, tensor, part",
    [
        ([0, 0, 1, 1], 1, (0, 2)),
        ([1, 1, 0, 0], 1, (1, 2)),  # the order of the topology, not of the numbers
        ([1, 0, 2, 3], 2, (0, 2)),  # two processes share the rows of a tensor group
        ([2, 3, 1, 0], 2, (1, 2)),
        ([0, 1, 0, 1], 1, None),
        ([1, 0, 0, 1], 1, None),
    ],
)
def test_the_part_of_a_batch_follows_the_place_of_the_devices(processes, tensor, part):
    assert meshes._part(Placed(processes, tensor)) == part
