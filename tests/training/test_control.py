"""ControlNet: what trains, where it starts and resumes, what is written, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import ldm_jax
from ldm_jax.conditions.base import embed
from ldm_jax.conditions.requests import inputs_for
from ldm_jax.convert import convert
from ldm_jax.interop.files import open_state
from ldm_jax.interop.native import save_model
from ldm_jax.training.optimizer import make_optimizer
from ldm_jax.training.state import init_state
from ldm_jax.training.tasks import make_task
from tests import tiny_models
from tests.conftest import ROOT
from tests.models.published import config_file

MODEL = tiny_models.config(
    tiny_models.STABLE["conditioning"],
    channel_mult=[1, 2],
    attention_resolutions=[1],
    context_dim=16,
)
PARAMS = tiny_models.random_params(MODEL, scale=0.3)
CLOSED = ("zero_convs", "middle_block_out", "input_hint_block/block_6/")  # 0 at first


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "base.safetensors"
    save_model(path, MODEL, PARAMS)
    return path


def control(base, **options):
    config = config_file(ROOT / "configs" / "controlnet.py").get_config("smoke")
    config.init_from = str(base)
    config.control.update(options)
    config.data.update(source="emoji", image_size=16, classes=("food & drink",), held_out=0.1)
    config.data.scenes = {}
    config.optimizer.update(lr=0.01, warmup=0, schedule="constant")
    config.train.update(ema_decay=0.5)
    return config


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """The files of a run, of a ControlNet of random numbers; nothing is compiled."""
    workdir, task = tmp_path_factory.mktemp("control"), make_task(control(base))
    section = task.resolved["conditioning"]["control"]
    moved = tiny_models.random_params({"conditioning": {"control": section}}, seed=2, scale=0.3)
    about, params = task.export(moved)
    save_model(workdir / "model.safetensors", about, params)
    task.adapters.write(workdir / task.adapters.file, moved, task.resolved)
    return workdir


def hint(seed=0, side=16):
    return np.random.default_rng(seed).uniform(size=(side, side, 3)).astype(np.float32)


def test_it_starts_as_a_copy_without_effect_and_trains_alone(base):
    config = control(base)
    task = make_task(config)
    optimizer = make_optimizer(config.optimizer, 4, task.adapters.networks)
    state = init_state(task, optimizer, 0, task.loaded)
    unet = flatten_dict(PARAMS["unet"], sep="/")
    flat = flatten_dict(state.params["control"], sep="/")
    assert state.params.keys() == state.ema.keys() == {"control"}
    copied = [path for path in flat if path in unet]
    for path in copied:
        np.testing.assert_array_equal(flat[path], unet[path], err_msg=path)
    assert len(copied) > 40 and not any("output" in path for path in flat)
    for path, leaf in flat.items():
        if path.startswith(CLOSED):
            assert not leaf.any(), path
    batch = next(task.batches(0))[1]
    assert batch["control"].shape == (8, 16, 16, 3) and np.ptp(batch["control"]) > 0.5
    gradients = functools.partial(task.gradients, phase=None)
    grads, _ = jax.eval_shape(gradients, state.params, task.frozen, batch, jax.random.key(0))
    assert grads.keys() == {"control"}
    before, changed = task.pipelines(state.ema)
    drawn = [
        pipe("kiwi", conditions={"control": hint()}, steps=2, guidance=2.0)
        for pipe in (before, changed)
    ]
    plain = ldm_jax.load(config.init_from)("kiwi", steps=2, guidance=2.0)
    for picture in drawn:
        np.testing.assert_array_equal(picture, plain)


def test_every_file_draws_the_same(base, run):
    state = open_state(run / "model.safetensors")
    assert {name.partition("/")[0] for name in state} == {"control"}
    pipe = ldm_jax.load(base)
    asked = dict(conditions={"control": hint()}, steps=2, guidance=2.0)
    whole = ldm_jax.load(run)("kiwi", **asked)
    np.testing.assert_array_equal(pipe.with_control(run)("kiwi", **asked), whole)
    plain = pipe("kiwi", steps=2, guidance=2.0)
    assert np.abs(whole - plain).max() > 1e-2
    closed = pipe.with_control(run, scale=0.0)("kiwi", **asked)
    np.testing.assert_array_equal(closed, plain)
    other = pipe.with_control(run)("kiwi", **asked | {"conditions": {"control": hint(1)}})
    assert np.abs(whole - other).max() > 1e-3


def test_other_software_gets_it_by_convert(base, run, tmp_path, capsys):
    file = run / "controlnet.safetensors"
    pipe = ldm_jax.load(base)
    asked = dict(conditions={"control": hint()}, steps=2)
    whole = pipe.with_control(run)("kiwi", **asked)
    for layout, name in (("diffusers", "folder"), ("compvis", "x.safetensors")):
        convert(str(file), str(tmp_path / name), layout)
        assert "control: " in capsys.readouterr().out
        made = pipe.with_control(tmp_path / name)
        np.testing.assert_array_equal(made("kiwi", **asked), whole)
    assert (tmp_path / "folder" / "diffusion_pytorch_model.safetensors").is_file()
    with pytest.raises(ValueError, match="a ControlNet: it is drawn with beside a model"):
        ldm_jax.load(file)


def test_it_goes_on_from_a_controlnet(base, run):
    task = make_task(control(base, init_from=str(run)))
    started = flatten_dict(task.loaded["control"], sep="/")
    for name, leaf in open_state(run / "controlnet.safetensors").items():
        path = name.removeprefix("control/")
        np.testing.assert_array_equal(started[path], leaf, err_msg=name)


def test_two_add_up_and_one_of_half_a_scale_is_half(base, run):
    """Zero convolutions are linear: half twice is the whole."""
    pipe = ldm_jax.load(base)
    half = pipe.with_control(run, 0.5).with_control(run, 0.5)
    asked = dict(steps=2, guidance=2.0)
    twice = half("kiwi", conditions={"control": hint(), "control_2": hint()}, **asked)
    once = pipe.with_control(run)("kiwi", conditions={"control": hint()}, **asked)
    np.testing.assert_allclose(twice, once, atol=1e-5)


def test_a_tile_takes_its_part_of_the_hint(base, run):
    """Where a tile lies alone, at an end, the output is that of this part with its hint."""
    pipe = ldm_jax.load(base).with_control(run)
    entries = {"caption": ["kiwi"], "control": hint(side=32)[:16]}
    inputs = inputs_for(pipe.model.embedders, entries, 1)
    condition = embed(pipe.model.embedders, pipe.params, inputs)
    embedded = condition.control["control"]
    x, t = jax.random.normal(jax.random.key(0), (1, 8, 16, 4)), jnp.full(1, 500.0)

    def output(x, embedded, tile):
        given = condition.replace(control={"control": embedded})
        return pipe.model.predict(pipe.params, [given], given, tile)(None)(x, t)

    tiled = output(x, embedded, 8)
    left, right = (
        output(x[part], embedded[part], 0) for part in (np.s_[:, :, :8], np.s_[:, :, 8:])
    )
    np.testing.assert_allclose(tiled[:, :, :4], left[:, :, :4], atol=2e-5)
    np.testing.assert_allclose(tiled[:, :, -4:], right[:, :, -4:], atol=2e-5)
    assert np.abs(output(x, embedded[:, :, ::-1], 8) - tiled).max() > 1e-2


@pytest.mark.parametrize("change, message", [
    (dict(adapters=dict(rank=4)), "control and adapters are two trainings"),
    (dict(init_from=""), r"control: for a trained model; name it with init_from=PATH"),
    (dict(trainable=("^unet",)), "with the section control nothing else trains"),
    (dict(control=dict(width=3)), "control has no option 'width'; it has kind, hint_in"),
    (dict(control=dict(hint_in=0)), "control.hint_in=0: choose a number above 0"),
    (dict(control=dict(hint_channels=(8, 8, 8))), r"shrinks pictures 2 times, so give 2 widths"),
    (dict(data=dict(conditions={})), r"needs the entry 'control' of each picture, and nothing"),
])  # fmt: skip
def test_settings_that_are_refused(base, change, message):
    config = control(base)
    with config.unlocked():
        config.update(change)
        if "data" in change:
            config.data.conditions = {}
    with pytest.raises(ValueError, match=message):
        make_task(config)


@pytest.mark.parametrize("hints, message", [
    (None, r"needs conditions=\{'control': an array\}"),
    (np.zeros((8, 16, 3)), "a hint of 8 × 16 pixels for a picture of 16 × 16"),
    (np.zeros((16, 16, 4)), r"the hint 'control' has the shape \(16, 16, 4\)"),
    (np.full((16, 16, 3), 7.0), "the hint 'control' has numbers outside of 0 … 1"),
    (np.full((16, 16, 3), np.nan), "control=nan: must be a finite number"),
    (np.zeros((3, 16, 16, 3)), "3 of control for 1 pictures"),
])  # fmt: skip
def test_hints_that_are_refused(base, run, hints, message):
    pipe = ldm_jax.load(run)
    given = None if hints is None else {"control": hints}
    with pytest.raises(ValueError, match=message):
        pipe("kiwi", conditions=given, steps=2)


def test_hints_of_any_form(run):
    (embedder,) = (e for e in ldm_jax.load(run).model.embedders if e.name == "control")
    grey = np.uint8(255 * hint()[..., 0])
    for given in (grey, grey[..., None], np.repeat(grey[..., None], 3, -1), grey[None, ..., None]):
        made = embedder.prepare({"control": given})
        assert made.shape == (1, 16, 16, 3) and made.dtype == np.float32
        np.testing.assert_allclose(made[0, ..., 1], grey / 255.0, rtol=1e-6)


def test_other_layouts_have_no_place_for_it(run, tmp_path):
    pipe = ldm_jax.load(run)
    for layout in ("compvis", "diffusers"):
        with pytest.raises(ValueError, match="no place for the ControlNet 'control'"):
            pipe.save(tmp_path / "x", layout=layout)
    pipe.save(tmp_path / "x.safetensors")
    asked = dict(conditions={"control": hint()}, steps=2)
    again = ldm_jax.load(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(again("kiwi", **asked), pipe("kiwi", **asked))
    assert jnp.issubdtype(jax.tree.leaves(again.params["control"])[0].dtype, np.floating)


def test_a_base_that_has_changed(base, run, tmp_path):
    held = base.read_bytes()
    try:
        other = tiny_models.random_params(MODEL, seed=1)
        save_model(base, MODEL, other)
        with pytest.raises(ValueError, match="holds a ControlNet of .*where another model is now"):
            ldm_jax.load(run)
    finally:
        base.write_bytes(held)
