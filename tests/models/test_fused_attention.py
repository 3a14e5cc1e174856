"""cuDNN's attention and splash attention: where they are used, and that they are attention.

Their kernels need a GPU or a TPU. Here cuDNN's arguments go to XLA's attention, splash attention is
interpreted, and programs for both are traced and lowered, not run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from ldm_jax.models import fused_attention
from ldm_jax.models.attention import Attention
from ldm_jax.models.dot_product import attend
from ldm_jax.runtime.meters import model_flops


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    with described("NVIDIA H100 80GB HBM3", "gpu"):
        yield


def described(kind, platform, sizes=(2,), axes=("data",)):
    """What is traced is for a mesh of devices that are not there."""
    device, auto = AbstractDevice(kind, None, platform), (AxisType.Auto,) * len(axes)
    mesh = AbstractMesh(sizes, axes, auto, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def shapes(queries=64, keys=77, heads=4, width=40, dtype=jnp.bfloat16, batch=2):
    shape = jax.ShapeDtypeStruct((batch, queries, heads, width), dtype)
    return shape, *(jax.ShapeDtypeStruct((batch, keys, heads, width), dtype),) * 2


def kernels(*arrays):
    """How many of cuDNN's kernels run forward and backward in attention and its gradient."""
    text = str(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1, 2)))(*arrays))
    return tuple(text.count(f"dot_product_attention_{which}_wrapper[") for which in ("fwd", "bwd"))


def loss(*arrays):
    return jnp.sum(attend(*arrays).astype(jnp.float32))


def drawn(queries, keys, heads=4, width=8, batch=2):
    """Queries, keys and values, and a weight of each output, float32."""
    draw = np.random.default_rng(0).normal
    lengths = queries, keys, keys, queries
    return [draw(size=(batch, n, heads, width)).astype(np.float32) for n in lengths]


def same(attention, *arrays, weight):
    """Asserts that value and gradient are those of `attend`, which here is no kernel."""

    def both(attention):
        def loss(*arrays):
            out = attention(*arrays)
            return jnp.sum(weight * out), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)

    for a, b in zip(*(jax.tree.leaves(both(f)) for f in (attention, attend)), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.parametrize("queries, keys", [(64, 64), (64, 77), (63, 64), (49, 1)])
def test_cudnn_s_arguments_are_attention(queries, keys):
    *arrays, weight = drawn(queries, keys)
    same(functools.partial(fused_attention.cudnn, implementation="xla"), *arrays, weight=weight)


@pytest.mark.parametrize("queries, keys", [(64, 64), (64, 77), (63, 64), (64, 1)])
def test_on_a_gpu_it_is_cudnn_s(gpu, queries, keys):
    assert kernels(*shapes(queries, keys)) == (1, 1)


@pytest.mark.parametrize("other", [dict(dtype=jnp.float32), dict(width=160), dict(width=20)])
def test_what_cudnn_has_not_is_ours(gpu, other):
    assert kernels(*shapes(**other)) == (0, 0)


def test_elsewhere_it_is_ours():
    assert kernels(*shapes()) == (0, 0)
    with described("a chip", "tpu"):
        assert kernels(*shapes()) == (0, 0)


class Device:
    def __init__(self, platform, capability):
        self.platform, self.compute_capability = platform, capability
        self.device_kind = "a GPU"


@pytest.mark.parametrize(
    "platform, capability, suits",
    [
        ("gpu", "8.6", True),
        ("gpu", "12.0", True),
        ("gpu", "7.5", False),  # Colab's T4
        ("gpu", "gfx942", False),  # AMD's
        ("cpu", "", False),
    ],
)
def test_the_default_device_decides_without_a_mesh(monkeypatch, platform, capability, suits):
    query, key, _ = shapes()
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(platform, capability)])
    assert fused_attention.kernel(query, key) == (fused_attention.cudnn if suits else None)
    with jax.default_device("cpu"):
        assert fused_attention.kernel(query, key) is None


def test_a_module_lowers_to_cudnn_s_kernel(gpu):
    module = Attention(heads=4, head_dim=40, dtype=jnp.bfloat16)
    x, context = (jax.ShapeDtypeStruct((2, n, 160), jnp.bfloat16) for n in (64, 77))
    params = jax.eval_shape(lambda *of: module.init(jax.random.key(0), *of), x, context)
    lowered = jax.jit(module.apply).trace(params, x, context).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__cudnn$fmhaSoftmax") == 1


@pytest.mark.parametrize("kind", ["cudnn", "splash"])
def test_products_are_counted(kind, request):
    """What a kernel computes again for the gradient is not the model's."""
    if kind == "cudnn":
        request.getfixturevalue("gpu")
        arrays, flops = shapes(64, 64), 4 * 2 * 4 * 64 * 64 * 40
    else:
        request.getfixturevalue("v5p")
        arrays, flops = shapes(2048, 1024), 4 * 2 * 4 * 2048 * 1024 * 40
    assert model_flops(attend, *arrays) == pytest.approx(flops, rel=1e-3)
    for attention in (attend, jax.checkpoint(attend)):
        gradient = jax.grad(lambda *a, f=attention: jnp.sum(f(*a).astype(jnp.float32)), (0, 1, 2))
        assert model_flops(gradient, *arrays) == pytest.approx(3 * flops, rel=1e-3)


@pytest.fixture
def v5p():
    with described("TPU v5", "tpu"):
        yield


AXES = ("data", "fsdp", "tensor")


@pytest.mark.parametrize("sizes", [(), (8, 1, 1), (2, 2, 2)])
def test_splash_is_attention(monkeypatch, sizes):
    """On every mesh; devices that hold their rows and heads send each other nothing."""
    monkeypatch.setattr(fused_attention, "BLOCK", 128)
    *arrays, weight = drawn(256, 128, batch=8)
    splash = functools.partial(fused_attention.splash, interpret=True)
    if not sizes:
        return same(splash, *arrays, weight=weight)
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    with jax.set_mesh(mesh):
        same(splash, *jax.device_put(arrays, place), weight=weight)


MESH = ((4, 2, 1), AXES)


@pytest.mark.parametrize(
    "kind, shape, mesh, pays",
    [
        ("TPU v5", dict(queries=1024, keys=1024), MESH, True),
        ("TPU v5", dict(queries=1024, keys=77), MESH, False),
        ("TPU v5", dict(queries=1536, keys=1536), MESH, False),  # no blocks of 1,024
        ("TPU v5", dict(queries=1024, keys=1024, dtype=jnp.float32), MESH, False),
        ("TPU v5", dict(queries=1024, keys=1024, width=160), MESH, False),
        ("TPU v5", dict(queries=1024, keys=1024, batch=12), MESH, False),
        ("TPU v5", dict(queries=1024, keys=1024, heads=5), ((4, 1, 2), AXES), False),
        ("TPU v5 lite", dict(queries=4096, keys=4096, batch=64), MESH, False),
        ("TPU v5 lite", dict(queries=4096, keys=4096, batch=128), MESH, True),
        ("TPU v6 lite", dict(queries=4096, keys=4096, batch=64), ((4,), ("data",)), True),
        ("TPU v9", dict(queries=4096, keys=4096, batch=128), MESH, False),
    ],
)
def test_where_splash_pays(kind, shape, mesh, pays):
    """By what each device has of the batch."""
    query, key, _ = shapes(**dict(batch=8) | shape)
    with described(kind, "tpu", *mesh):
        found = fused_attention.kernel(query, key)
    assert found == (fused_attention.splash if pays else None)
