"""Ahead-of-time compilation: topologies and their errors, what a program needs, the roofline."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from ldm_jax.runtime import topologies
from ldm_jax.runtime.meters import Chip
from ldm_jax.runtime.plan import Usage, compile_usage, measure, roofline, size
from ldm_jax.runtime.topologies import topology_devices

CHIP = Chip("toy", flops=100.0, memory=1000.0, bandwidth=10.0, interconnect=5.0)


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "v9:2x2",
            r"v9:2x2: no family 'v9'; a slice is written family:sides.*v5e \(v5e:4x4\)",
        ),
        ("4x4", "no family '4x4'; a slice is written"),
        ("v5e", "v5e: slices of v5e have 2 sides, as in v5e:4x4"),
        ("v5e:2x2x2", "slices of v5e have 2 sides"),
        ("v5p:2x2", "slices of v5p have 3 sides, as in v5p:2x2x2"),
        ("v5e:0x4", "slices of v5e have 2 sides"),
        ("h100:2x8", "h100:2x8: slices of h100 have 1 side, as in h100:8"),
    ],
)
def test_an_unknown_topology(name, message):
    with pytest.raises(ValueError, match=message):
        topology_devices(name)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"v5e:2x2 needs .*: pip install 'jax\[tpu\]==\d"):
        topology_devices("v5e:2x2")
    with pytest.raises(
        ImportError, match=r"h100:8 needs the GPU .*: pip install 'jax\[cuda12\]==\d"
    ):
        topology_devices("h100:8")


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_a_topology_that_libtpu_refuses():
    with pytest.raises(ValueError, match='"v5e:3x5" is not divisible .*; a slice is written'):
        topology_devices("v5e:3x5")


def test_what_a_program_needs():
    def step(state, x):
        return state + 1.0, jnp.sum(x @ x)

    program = jax.jit(step, donate_argnums=0)
    lowered = program.lower(jnp.zeros(1000), jnp.zeros((64, 64)))
    usage = compile_usage(lowered)
    assert usage.fits and usage.arguments == 4 * (1000 + 64 * 64)
    assert usage.outputs < 1000  # the state's memory is donated
    assert usage.needed >= usage.arguments + usage.temporaries
    assert usage.flops == pytest.approx(2 * 64**3, rel=0.1)
    assert usage.accessed >= usage.arguments and usage.sent == {}
    assert measure(usage.compiled, runs=1) > 0.0


class TooLarge:
    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


USED = (
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm. "
    "Exceeded hbm capacity by 5.75G."
)
REQUIRED = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (21.50G) exceeds available HBM (15.75G). HLO module: jit_loss."
)


@pytest.mark.parametrize("message", [USED, REQUIRED])
def test_a_program_that_does_not_fit(message):
    usage = compile_usage(TooLarge(message))
    assert not usage.fits
    assert (usage.needed, usage.capacity) == (21.5 * 2**30, 15.75 * 2**30)


def test_another_error_of_the_compiler_is_raised():
    class Broken:
        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: no")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile_usage(Broken())


@pytest.mark.parametrize(
    "counted, accessed, sent, by, seconds, mfu",
    [
        (50.0, 20.0, {}, "products", 4.0, 1.0),  # XLA misses what loops repeat
        (800.0, 20.0, {}, "products", 8.0, 0.5),  # recomputation
        (400.0, 80.0, {}, "memory", 8.0, 0.5),
        (400.0, 20.0, {"all-reduce": 60.0, "all-gather": 20.0}, "interconnect", 16.0, 0.25),
    ],
)
def test_the_roofline(counted, accessed, sent, by, seconds, mfu):
    usage = Usage(flops=counted, accessed=accessed, sent=sent)
    bound = roofline(usage, 400.0, CHIP)
    assert (bound.by, bound.seconds, bound.mfu) == (by, seconds, mfu)


def test_sizes():
    assert [size(n) for n in (0, 1000, 1024, 1.5 * 2**30)] == ["0 B", "1000 B", "1 KiB", "1.5 GiB"]
