"""The plan with the TPU's compiler: `make plan` runs this where libtpu is installed."""

import importlib.util

import jax
import pytest

from ldm_jax.runtime.mesh import make_mesh
from ldm_jax.runtime.meters import CHIPS
from ldm_jax.runtime.plan import compile_usage, roofline
from ldm_jax.runtime.topologies import topology_devices
from ldm_jax.training.program import abstract_state, lower_sampler, lower_step
from ldm_jax.training.tasks import make_task
from tests.conftest import ROOT
from tests.models.published import config_file

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu"),
]
A_CHIP = 2  # pictures


def smoke():
    config = config_file(ROOT / "configs" / "txt2img.py").get_config("smoke")
    config.optimizer.update(name="adamw")  # compiles in a fifth of Muon's time
    return config


@pytest.fixture(scope="module")
def steps():
    """The usage of a training step on 4 and on 16 chips, and its model's FLOPs on one of them."""
    found = {}
    for name in ("v5e:2x2", "v5e:4x4"):
        config = smoke()
        mesh = make_mesh(config.mesh, topology_devices(name))
        config.train.batch_size = A_CHIP * mesh.size
        lowered = lower_step(make_task(config, abstract=True), config, mesh)
        found[mesh.size] = compile_usage(lowered.lowered), lowered.flops / mesh.size
    return found


def test_the_chips_of_a_slice():
    devices = topology_devices("v5p:2x2x2")
    assert len(devices) == 8 and CHIPS[devices[0].device_kind].name == "v5p"
    assert len(topology_devices("v6e:4x4")) == 16


def test_more_chips_with_as_much_each_cost_a_chip_the_same(steps):
    (few, of_few), (many, of_many) = steps[4], steps[16]
    assert of_few == of_many > 0
    assert many.flops == pytest.approx(few.flops, rel=0.02)
    assert many.needed == pytest.approx(few.needed, rel=0.05)


def test_the_model_s_flops_are_xla_s(steps):
    """XLA also counts what is no product, of which a network this narrow has more."""
    usage, flops = steps[4]
    assert 0.5 < flops / usage.flops < 1.05


def test_data_parallelism_sends_the_gradients_once(steps):
    """A ring of n chips sends 2(n − 1)/n of what all hold, which is the gradient and the loss."""
    config = smoke()
    _, state = abstract_state(make_task(config, abstract=True), config)
    gradient = 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    for n, (usage, _) in steps.items():
        whole = usage.sent["all-reduce"] * n / (2 * (n - 1))
        assert whole == pytest.approx(gradient, rel=0.01)


def test_ten_times_the_steps_of_drawing():
    """They need no more memory, for nothing of a trajectory is kept, and more products."""
    config = smoke()
    mesh = make_mesh(config.mesh, topology_devices("v5e:2x2"))
    task = make_task(config, abstract=True)
    needed, times = [], []
    for count in (2, 20):
        lowered = lower_sampler(task, config, mesh, mesh.size, count)
        usage = compile_usage(lowered.lowered)
        needed.append(usage.needed)
        bound = roofline(usage, lowered.flops / mesh.size, CHIPS["TPU v5e"])
        times.append(bound.times["products"])
    assert needed[1] == pytest.approx(needed[0], rel=0.02)
    assert 2.0 < times[1] / times[0] < 10.5
