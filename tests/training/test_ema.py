"""Averages of other decays, and power-function averages of any width after training."""

import subprocess
import sys

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import load_file

from ldm_jax.interop.native import save_model
from ldm_jax.interop.opening import open_any
from ldm_jax.runtime.checkpoints import Checkpoints, abstract_like
from ldm_jax.training import loop, snapshots
from ldm_jax.training.ema import (
    Constant,
    Power,
    more_averages,
    move,
    post_hoc,
    power_exponent,
    unlike,
    update_ema,
)
from ldm_jax.training.snapshots import write_average, write_snapshot
from ldm_jax.training.state import State
from tests import tiny_models
from tests.training.least_squares import Task, steps

WIDTHS = (0.05, 0.1)


def profile(sigma_rel, step):
    """The exact weight of every update's parameters: (i/T)^(γ+1) − ((i − 1)/T)^(γ+1)."""
    cumulative = (np.arange(step + 1) / step) ** (power_exponent(sigma_rel) + 1.0)
    return np.diff(cumulative)


def walk(count=400, size=3):
    """Parameters that move at random."""
    return np.cumsum(np.random.default_rng(0).normal(size=(count, size)), axis=0)


def tracked(average, values):
    """The average after each update of float64 `values`."""
    with jax.enable_x64(True):

        def step(mean, item):
            number, value = item
            mean = move(mean, value, average.weight(number).astype(jnp.float64))
            return mean, mean

        numbers = jnp.arange(len(values))
        return np.asarray(jax.lax.scan(step, jnp.full(3, 1e6), (numbers, jnp.asarray(values)))[1])


@pytest.mark.parametrize("sigma_rel, exponent", [(0.05, 16.97), (0.1, 6.94), (12**-0.5, 0.0)])
def test_exponents_are_those_of_the_paper(sigma_rel, exponent):
    """Karras et al. 2024, §3.1: σ_rel of 0.05 and 0.10 are γ ≈ 16.97 and 6.94."""
    gamma = power_exponent(sigma_rel)
    assert gamma == pytest.approx(exponent, abs=5e-3)
    assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.1, 0.25])
def test_an_average_is_its_closed_form(sigma_rel):
    """Whatever it starts from; the width of its weights is `sigma_rel` of the length."""
    values = walk()
    found = tracked(Power(sigma_rel), values)
    for step in (1, 2, 37, 400):
        np.testing.assert_allclose(
            found[step - 1], profile(sigma_rel, step) @ values[:step], rtol=1e-5
        )
    weights, place = profile(sigma_rel, 20_000), np.linspace(0, 1, 20_000)
    mean = weights @ place
    assert (weights @ (place - mean) ** 2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.06, 0.075, 0.1, 0.15, 0.2])
def test_post_hoc_gives_the_average_that_was_not_tracked(sigma_rel):
    """From 40 snapshots of two widths. Widths that were tracked come back exactly."""
    values = walk(4000)
    numbers = range(100, 4001, 100)
    snapshots = [(width, number) for width in WIDTHS for number in numbers]
    means = {width: tracked(Power(width), values) for width in (*WIDTHS, sigma_rel)}
    kept = np.stack([means[width][number - 1] for width, number in snapshots])
    for step in (4000, 2000):
        factors = post_hoc(snapshots, sigma_rel, step)
        error = np.abs(factors @ kept - means[sigma_rel][step - 1]).max()
        scale = np.abs(values[step - 1] - means[0.1][step - 1]).max()  # of what averaging changes
        exact = sigma_rel in WIDTHS
        assert error < (1e-6 if exact else 0.02) * scale
        assert factors.sum() == pytest.approx(1.0, abs=1e-9)
        assert unlike(snapshots, factors, sigma_rel, step) < (1e-5 if exact else 0.02)


def test_fewer_snapshots_are_worse_and_it_is_said():
    few, many = (
        [(width, number) for width in WIDTHS for number in range(4000 // n, 4001, 4000 // n)]
        for n in (2, 32)
    )
    errors = [unlike(s, post_hoc(s, 0.07, 4000), 0.07, 4000) for s in (few, many)]
    assert errors[0] > 0.04 > 1e-3 > errors[1]


def test_a_constant_decay_is_that_of_the_first_average():
    a, b = {"w": jnp.arange(3.0)}, {"w": jnp.ones(3)}
    for step in (0, 7, 10**5):
        expected = update_ema(a, b, jnp.int32(step), 0.99)
        found = move(a, b, Constant(0.99).weight(jnp.int32(step)))
        np.testing.assert_array_equal(found["w"], expected["w"])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(ema_decays=(1.5,)), "train.ema_decays: 1.5 is not in 0 ≤ decay < 1"),
        (dict(ema_sigma_rel=(0.05, 0.4)), "train.ema_sigma_rel=0.4: choose a width between 0 and"),
        (dict(ema_sigma_rel=(0.05,)), "made from two, such as"),
        (dict(ema_sigma_rel=(0.1, 0.1)), "one stands twice"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        more_averages(ml_collections.ConfigDict(changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Forty steps with snapshots at every second, stopped and resumed, of three widths."""
    workdir = tmp_path_factory.mktemp("averages") / "run"
    changes = {"train.ema_sigma_rel": (0.05, 0.1), "train.ema_decays": (0.5,)}
    changes |= {"train.checkpoint_every": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_task", lambda *_: Task())
        for count in (20, 40):
            loop.train(steps(count, **changes), workdir)
        changes["train.ema_sigma_rel"] = (0.05, 0.1, 0.15)
        loop.train(steps(40, **changes), workdir.with_name("direct"))
    return workdir


def test_checkpoints_from_before_further_averages_are_read(tmp_path):
    """They have four fields. Moments are converted to the type that is wanted now."""

    @flax.struct.dataclass
    class Before:
        step: jax.Array
        params: dict
        ema: dict
        opt_state: tuple

    net = {"net": {"w": jnp.arange(3.0)}}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(7, Before(jnp.int32(7), net, net, (net,)), {})
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), net)
    wanted = jax.eval_shape(lambda: State(jnp.int32(0), net, net, (half,)))
    where = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), wanted)
    step, state = checkpoints.restore_newest(abstract_like(wanted, where))
    checkpoints.close()
    assert step == state.step == 7 and state.averages == {}
    np.testing.assert_array_equal(state.params["net"]["w"], net["net"]["w"])
    assert state.opt_state[0]["net"]["w"].dtype == jnp.bfloat16


def test_a_run_exports_other_decays_and_keeps_its_snapshots(run):
    names = sorted(path.name for path in (run / "averages").iterdir())
    assert names == [f"{step:07d}.safetensors" for step in range(2, 41, 2)]
    model, other = (load_file(run / f"model{name}.safetensors") for name in ("", "_decay_0.5"))
    assert model.keys() == other.keys() and (model["net/w"] != other["net/w"]).any()


def test_the_command_makes_the_average_of_another_width(run, monkeypatch, tmp_path, caplog):
    """As near to that of a run which tracked it as the snapshots allow."""
    caplog.set_level("INFO", "ldm_jax")
    monkeypatch.setattr(snapshots, "open_any", lambda path: _Opened(load_file(path)))
    assert write_average(run, 0.15, tmp_path / "made.safetensors") == 40
    made = load_file(tmp_path / "made.safetensors")
    direct = load_file(run.with_name("direct") / "averages" / "0000040.safetensors")
    narrow = direct["sigma_rel_0.05/net/w"]
    wanted = direct["sigma_rel_0.15/net/w"]
    assert np.abs(made["net/w"] - wanted).max() < 0.05 * np.abs(narrow - wanted).max()
    write_average(run, 0.1, tmp_path / "made.safetensors", step=20)
    own = load_file(run / "averages" / "0000020.safetensors")["sigma_rel_0.1/net/w"]
    np.testing.assert_allclose(load_file(tmp_path / "made.safetensors")["net/w"], own, rtol=1e-5)


def test_the_command_line_writes_a_model_that_opens(tmp_path):
    """Averaged are the networks in the snapshots; the autoencoder is that of the run's model."""
    config, step = tiny_models.UNCONDITIONAL, 5
    params = tiny_models.random_params(config)
    save_model(tmp_path / "model.safetensors", config, params)
    trees = {
        Power(w).name: {"unet": jax.tree.map(lambda p: 0 * p + 3, params["unet"])} for w in WIDTHS
    }
    write_snapshot(tmp_path, step, trees | {"decay_0.9": {}})
    out = tmp_path / "averaged.safetensors"
    command_line = [sys.executable, "-m", "ldm_jax.average", tmp_path, f"--out={out}"]
    done = subprocess.run(command_line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sigma_rel 0.07 at step 5" in done.stdout
    assert "2 snapshots of 1 steps; the weights differ by 0.0" in done.stderr + done.stdout
    found = open_any(out)
    assert found.config["unet"] == config["unet"]
    for leaf in jax.tree.leaves(found.params["unet"]):
        np.testing.assert_allclose(leaf, 3.0, rtol=1e-6)  # what stays the same is the average
    for name, leaf in flatten_dict(params["autoencoder"], sep="/").items():
        np.testing.assert_array_equal(
            flatten_dict(found.params["autoencoder"], sep="/")[name], leaf
        )


class _Opened:
    """What `open_any` returns, of a task that only tests have."""

    def __init__(self, tensors):
        self.config = {"task": "least squares"}
        self.params = {"net": {name.partition("/")[2]: tensors[name] for name in tensors}}


def test_bad_input_of_the_command(run, tmp_path):
    with pytest.raises(ValueError, match="sigma_rel=0.5: choose a width between 0 and 0.2887"):
        write_average(run, 0.5, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="no snapshot of this step; the nearest is of step 40"):
        write_average(run, 0.1, tmp_path / "m.safetensors", step=60)
    with pytest.raises(ValueError, match="has no snapshots of averages: train with"):
        write_average(tmp_path, 0.1, tmp_path / "m.safetensors")
