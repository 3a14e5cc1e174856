"""T2I-Adapter: what trains, where it starts, what is written, and what is refused.

What it has in common with a ControlNet is in `test_control.py`.
"""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import ldm_jax
from ldm_jax.convert import convert
from ldm_jax.interop.files import open_state
from ldm_jax.interop.native import BUNDLED, save_model
from ldm_jax.training.control import Options, with_control
from ldm_jax.training.loop import train
from ldm_jax.training.optimizer import make_optimizer
from ldm_jax.training.state import init_state
from ldm_jax.training.tasks import make_task
from tests import tiny_models
from tests.conftest import ROOT
from tests.models.published import config_file

MODEL = tiny_models.config(
    tiny_models.STABLE["conditioning"],
    channel_mult=[1, 2],
    attention_resolutions=[2],
    context_dim=16,
)
PARAMS = tiny_models.random_params(MODEL, scale=0.3)
SECTION = dict(channels=[16, 32], halved=[], hint_in=3, factor=4, num_res_blocks=2, light=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "base.safetensors"
    save_model(path, MODEL, PARAMS)
    return path


def config_of(base, **options):
    config = config_file(ROOT / "configs" / "controlnet.py").get_config("smoke")
    config.init_from = str(base)
    config.control.update(dict(kind="t2i") | options)
    config.data.update(source="emoji", image_size=16, classes=("food & drink",), held_out=0.1)
    config.data.scenes = {}
    config.optimizer.update(lr=0.01, warmup=0, schedule="constant")
    config.train.update(ema_decay=0.5)
    return config


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """The files of a run, of an adapter of random numbers; nothing is compiled."""
    workdir, task = tmp_path_factory.mktemp("t2i"), make_task(config_of(base))
    section = task.resolved["conditioning"]["control"]
    moved = tiny_models.random_params({"conditioning": {"control": section}}, seed=2, scale=0.3)
    about, params = task.export(moved)
    save_model(workdir / "model.safetensors", about, params)
    task.adapters.write(workdir / task.adapters.file, moved, task.resolved)
    return workdir


def hint(seed=0, side=16):
    return np.random.default_rng(seed).uniform(size=(side, side, 3)).astype(np.float32)


def asked(seed=0, **more):
    return dict(conditions={"control": hint(seed)}, steps=2, guidance=2.0) | more


def test_its_shape_is_of_the_unet(base):
    """A map for each level, as large as the UNet takes it."""
    resolved = make_task(config_of(base)).resolved
    assert resolved["conditioning"]["control"] == dict(kind="t2i", dropout=0.0, network=SECTION)
    bundled = ldm_jax.load(BUNDLED).config
    made, _ = with_control(bundled, bundled["autoencoder"], Options(kind="t2i", hint_in=1))
    fields = dict(channels=[64, 128], halved=[], factor=16, hint_in=1)
    assert made["conditioning"]["control"]["network"] == SECTION | fields


def test_it_starts_without_effect_and_trains_alone(base):
    config = config_of(base)
    task = make_task(config)
    state = init_state(task, make_optimizer(config.optimizer, 4, ("control",)), 0, task.loaded)
    assert state.params.keys() == state.ema.keys() == {"control"}
    flat = flatten_dict(state.params["control"], sep="/")
    assert not flat["conv_in/kernel"].any() and flat["body_0_resnets_0_block1/kernel"].any()
    batch = next(task.batches(0))[1]
    gradients = functools.partial(task.gradients, phase=None)
    grads, _ = jax.eval_shape(gradients, state.params, task.frozen, batch, jax.random.key(0))
    assert grads.keys() == {"control"}
    _, fresh = task.pipelines(state.ema)
    (embedder,) = (e for e in fresh.model.embedders if e.name == "control")
    made = embedder(fresh.params["control"], hint()[None])
    for one in made.features:
        np.testing.assert_array_equal(one, 0.0)
    plain = ldm_jax.load(base)("kiwi", steps=2, guidance=2.0)
    # Zeros are added, to the same numbers, but in another program, which rounds differently.
    np.testing.assert_allclose(fresh("kiwi", **asked()), plain, atol=1e-5)


def test_every_file_draws_the_same(base, run, tmp_path, capsys):
    assert {name.partition("/")[0] for name in open_state(run / "model.safetensors")} == {"control"}
    pipe = ldm_jax.load(base)
    whole = ldm_jax.load(run)("kiwi", **asked())
    np.testing.assert_array_equal(pipe.with_control(run)("kiwi", **asked()), whole)
    for layout, name in (("diffusers", "folder"), ("compvis", "x.safetensors")):
        convert(str(run / "t2i_adapter.safetensors"), str(tmp_path / name), layout)
        assert "t2i: " in capsys.readouterr().out
        np.testing.assert_array_equal(pipe.with_control(tmp_path / name)("kiwi", **asked()), whole)
    plain = pipe("kiwi", steps=2, guidance=2.0)
    assert np.abs(whole - plain).max() > 1e-2
    closed = pipe.with_control(run, scale=0.0)("kiwi", **asked())
    np.testing.assert_allclose(closed, plain, atol=1e-5)
    assert np.abs(whole - ldm_jax.load(run)("kiwi", **asked(1))).max() > 1e-3
    with pytest.raises(ValueError, match="a T2I-Adapter: it is drawn with beside a model"):
        ldm_jax.load(run / "t2i_adapter.safetensors")


def test_two_add_up_and_a_saved_model_keeps_their_scales(base, run, tmp_path):
    """Half of the maps twice is the whole."""
    half = ldm_jax.load(base).with_control(run, 0.5).with_control(run, 0.5)
    both = asked(conditions={"control": hint(), "control_2": hint()})
    twice = half("kiwi", **both)
    np.testing.assert_allclose(twice, ldm_jax.load(run)("kiwi", **asked()), atol=1e-5)
    half.save(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(ldm_jax.load(tmp_path / "x.safetensors")("kiwi", **both), twice)
    with pytest.raises(ValueError, match="has no place for the T2I-Adapter 'control'"):
        half.save(tmp_path / "y", layout="diffusers")


@pytest.mark.long
def test_it_trains_and_resumes(base, tmp_path):
    config = config_of(base)
    for steps, workdir in ((4, "whole"), (2, "parts"), (4, "parts")):
        config.train.steps = steps
        train(config, tmp_path / workdir)
    ours, theirs = (
        open_state(tmp_path / w / "t2i_adapter.safetensors") for w in ("parts", "whole")
    )
    assert list(ours) == list(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    task = make_task(config_of(base, kind="controlnet", init_from=str(tmp_path / "whole")))
    started = flatten_dict(task.loaded["control"], sep="/")
    assert task.adapters.file == "t2i_adapter.safetensors"
    assert started["conv_in/kernel"].any()
    for name, leaf in theirs.items():
        np.testing.assert_array_equal(started[name.removeprefix("t2i/")], leaf, err_msg=name)


@pytest.mark.parametrize("options, message", [
    (dict(kind="lora"), "control.kind='lora': choose one of controlnet, t2i"),
    (dict(hint_channels=(8, 8)), "control.hint_channels: a T2I-Adapter has none; its widths are"),
])  # fmt: skip
def test_settings_that_are_refused(base, options, message):
    with pytest.raises(ValueError, match=message):
        make_task(config_of(base, **options))


@pytest.mark.parametrize("given, more, message", [
    (hint(side=8), {}, "features of 2 × 2 × 16 where the UNet has 4 × 4 × 16: its hint must have"),
    (np.zeros((16, 18, 3)), {}, r"T2I-Adapter's hint \(16, 18\): sides must be multiples of 4 pix"),
    (np.zeros((16, 16, 4)), {}, r"the hint 'control' has the shape \(16, 16, 4\)"),
    (hint(side=32), dict(height=32, width=32, tile=16), "tile: a T2I-Adapter's features are of"),
])  # fmt: skip
def test_hints_that_are_refused(run, given, more, message):
    with pytest.raises(ValueError, match=message):
        ldm_jax.load(run)("kiwi", conditions={"control": given}, steps=2, **more)


def test_hints_of_two_sizes(base, run):
    pipe = ldm_jax.load(base).with_control(run).with_control(run)
    hints = {"control": hint(), "control_2": hint(side=8)}
    with pytest.raises(ValueError, match="features of 2 × 2 × 16 and 4 × 4 × 16: their hints must"):
        pipe("kiwi", conditions=hints, steps=2)


def test_a_grey_adapter_takes_colours(base):
    task = make_task(config_of(base, hint_in=1))
    (embedder,) = (e for e in task.model.embedders if e.name == "control")
    colours = hint()
    made = embedder.prepare({"control": colours})
    assert made.shape == (1, 16, 16, 1)
    weights = [0.299, 0.587, 0.114]
    np.testing.assert_allclose(made[0, ..., 0], colours @ weights, atol=1e-6)
    grey = np.uint8(255 * colours[..., 0])
    for given in (grey, np.repeat(grey[..., None], 3, -1)):
        np.testing.assert_allclose(
            embedder.prepare({"control": given})[0, ..., 0], grey / 255.0, atol=1e-6
        )
