"""The plan with XLA's compiler for NVIDIA GPUs, where jax's CUDA plugin is installed; no GPU."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from ldm_jax.models.dot_product import attend
from ldm_jax.runtime.mesh import make_mesh
from ldm_jax.runtime.meters import CHIPS
from ldm_jax.runtime.plan import compile_usage
from ldm_jax.runtime.topologies import GPUS, topology_devices

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
pytestmark = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, PLUGINS)), reason="needs jax's CUDA plugin"
)


@pytest.mark.parametrize("name", GPUS)
def test_the_gpus_of_a_host(name):
    devices = topology_devices(f"{name}:8")
    assert len(devices) == 8 and CHIPS[devices[0].device_kind].name.lower() == name


@pytest.mark.parametrize("keys", [1024, 77])
def test_attention_keeps_no_weights(keys):
    """cuDNN's: on 2 × 2 GPUs, which hold rows and heads and send each other nothing."""
    mesh = make_mesh(dict(data=2, tensor=2), topology_devices("h100:4"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "tensor"))
    arrays = [
        jax.ShapeDtypeStruct((4, tokens, 8, 64), jnp.bfloat16, sharding=place)
        for tokens in (1024, keys, keys)
    ]

    def loss(*arrays):
        return jnp.sum(attend(*arrays).astype(jnp.float32))

    with jax.set_mesh(mesh):
        usage = compile_usage(jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays))
    assert usage.compiled.as_text().count("__cudnn$fmhaSoftmax") == 2
    assert set(usage.sent) <= {"all-reduce"}
    if keys == 1024:
        weights = 2 * 4 * 8 * 1024 * keys / mesh.size
        assert usage.temporaries < weights / 2


def test_a_program_that_does_not_fit():
    mesh = make_mesh({}, topology_devices("h100:1"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    array = jax.ShapeDtypeStruct((2**18, 2**18), jnp.float32, sharding=place)
    usage = compile_usage(jax.jit(lambda a: a + 1.0).lower(array), capacity=80 * 2**30)
    assert not usage.fits and usage.needed == 2 * 4 * 2**36
