"""Distillation: where a student starts, what trains, what is written, and what is refused."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import ldm_jax
from ldm_jax.diffusion.plan import Sampling
from ldm_jax.interop.files import open_state
from ldm_jax.interop.native import save_model
from ldm_jax.runtime.logging import read_metrics
from ldm_jax.training.loop import train
from ldm_jax.training.optimizer import make_optimizer
from ldm_jax.training.state import init_state
from ldm_jax.training.tasks import make_task
from ldm_jax.training.trainable import merge
from tests import tiny_models
from tests.conftest import ROOT
from tests.models.published import config_file

MODEL = tiny_models.config(
    tiny_models.STABLE["conditioning"], channel_mult=[1], attention_resolutions=[1], context_dim=16
)
PARAMS = tiny_models.random_params(MODEL, scale=0.3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "base.safetensors"
    save_model(path, MODEL, PARAMS)
    return path


def distill(base, variant="smoke", **options):
    config = config_file(ROOT / "configs" / "distill.py").get_config(variant)
    config.init_from = str(base)
    config.distill.update(options)
    if config.get("adapters"):
        config.adapters.update(rank=2, targets=("^unet/.*/attn1/",))
    config.data.update(source="emoji", image_size=16, classes=("food & drink",), held_out=0.1)
    config.data.scenes = {}
    config.optimizer.update(lr=1e-3, warmup=0)
    config.train.update(steps=4, batch_size=8, checkpoint_every=2, log_every=2, preview_every=4)
    config.sampling.prompts = ("a kiwi",)
    return config


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """The files of a run, of a student of random numbers; nothing is compiled."""
    workdir, task = tmp_path_factory.mktemp("student"), make_task(distill(base))
    moved = tiny_models.random_params({"unet": task.resolved["unet"]}, seed=2, scale=0.3)
    save_model(workdir / "model.safetensors", *task.export(moved))
    return workdir


def test_a_student_starts_as_its_teacher_and_its_unet_trains_alone(base):
    config = distill(base)
    task = make_task(config)
    state = init_state(task, make_optimizer(config.optimizer, 4, ("unet",)), 0, task.loaded)
    flat = flatten_dict(state.params, sep="/")
    teacher = flatten_dict({"unet": PARAMS["unet"]}, sep="/")
    assert flat.keys() - teacher.keys() == {"unet/time_embed_cond_proj/kernel"}
    assert not flat["unet/time_embed_cond_proj/kernel"].any()
    for path, leaf in teacher.items():
        np.testing.assert_array_equal(flat[path], leaf, err_msg=path)
    assert task.frozen.keys() == {"teacher", "text", "autoencoder"}
    about, params = task.export(state.ema)
    assert params.keys() == {"unet", "text", "autoencoder"}
    (pipe,) = task.pipelines(state.ema)
    asked = dict(steps=2, sampler="ddim")
    drawn = [pipe("a kiwi", guidance=g, **asked) for g in (1.0, 5.0)]
    np.testing.assert_array_equal(*drawn)
    asked["sampler"] = Sampling("ddim", spacing="lcm")
    plain = ldm_jax.load(base)("a kiwi", guidance=1.0, **asked)
    np.testing.assert_allclose(drawn[0], plain, atol=1e-5)


def test_a_student_is_drawn_in_few_steps_at_any_scale(run, tmp_path):
    names = {name.partition("/")[0] for name in open_state(run / "model.safetensors")}
    assert names == {"unet", "text", "autoencoder"}
    pipe = ldm_jax.load(run)
    assert pipe.config["sampling"]["sampler"] == "lcm" and pipe.config["sampling"]["steps"] == 2
    pictures = [pipe("a kiwi", guidance=g) for g in (1.0, 9.0)]
    assert np.abs(pictures[0] - pictures[1]).max() > 1e-3  # the scale is an input
    pipe.save(tmp_path / "folder", layout="diffusers")
    again = ldm_jax.load(tmp_path / "folder")
    np.testing.assert_allclose(again("a kiwi", steps=2, guidance=9.0), pictures[1], atol=1e-6)


@pytest.mark.long
def test_a_run_improves_and_resumes_to_the_same_bit(base, tmp_path):
    runs, config = [], distill(base)
    config.train.update(steps=40, checkpoint_every=20, log_every=40, preview_every=40)
    for stop in (False, True):
        runs.append(tmp_path / str(stop))
        if stop:
            config.train.steps = 20
            config.optimizer.schedule = "constant"
            train(config, runs[-1])
            config.train.steps = 40
        config.optimizer.schedule = "constant"
        train(config, runs[-1])
    first, second = (open_state(where / "model.safetensors") for where in runs)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    *_, last = [m for m in read_metrics(runs[0]) if m["kind"] == "held_out"]
    task = make_task(config)
    assert 0.0 < last["loss"] < task.evaluate(task.loaded)["loss"]


def test_factors_learn_from_the_model_without_them(base):
    config = distill(base, "lora")
    task = make_task(config)
    assert task.adapters is not None and "teacher" not in task.frozen
    optimizer = make_optimizer(config.optimizer, 4, task.adapters.networks)
    state = init_state(task, optimizer, 0, task.loaded)
    batch = next(task.batches(0))[1]

    @jax.jit
    def loss(params):
        whole = {name: dict(part) for name, part in task.frozen.items()}
        latents = task._latents(task.frozen, batch, jax.random.key(1))
        inputs = {"text": batch["text"]}
        arguments = (merge(whole, params), latents, inputs, jax.random.key(2))
        return task._objective.loss(*arguments).mean()

    first, grads = jax.value_and_grad(loss)(state.params)
    flat = flatten_dict(grads, sep="/")
    assert flat and all("lora_" in path for path in flat)
    assert any(leaf.any() for path, leaf in flat.items() if path.endswith("lora_up"))
    # The teacher does not move with the factors: with `up` of 1, only the student's part differs.
    moved = jax.tree.map(lambda leaf: leaf + 0.1, state.params)
    assert np.isfinite(first) and float(loss(moved)) != float(first)


@pytest.mark.parametrize("variant, spacing", [
    ("guidance", MODEL["diffusion"]["spacing"]), ("smoke", "lcm"), ("lora", "lcm"),
])  # fmt: skip
def test_a_consistency_model_has_its_own_grid(base, variant, spacing):
    assert make_task(distill(base, variant)).resolved["diffusion"]["spacing"] == spacing


@pytest.mark.parametrize("change, message", [
    (dict(distill=dict(kind="x")), "distill.kind='x': choose one of consistency, guidance"),
    (dict(distill=dict(guidance=(3.0, 1.0))), r"distill.guidance=\(3.0, 1.0\): give the least and"),
    (dict(distill=dict(guidance=(3.0,))), r"distill.guidance=\(3.0,\): give the least and"),
    (dict(distill=dict(delta=0.0)), "distill: dim must be at least 0, and delta above 0"),
    (dict(adapters=dict(rank=2)), "factors of a LoRA have no input for the scale: use dim=0"),
    (dict(control=dict(hint_in=3)), "distill and control are two trainings"),
    (dict(init_from=""), "distill: for a trained model; name it with init_from=PATH"),
])  # fmt: skip
def test_settings_that_are_refused(base, change, message):
    config = distill(base)
    with config.unlocked():
        config.update(change)
    with pytest.raises(ValueError, match=message):
        make_task(config)


def test_models_that_are_refused(base, run, tmp_path):
    with pytest.raises(ValueError, match="the model of init_from was distilled already"):
        make_task(distill(run))
    section = {"text": MODEL["conditioning"]["text"] | dict(dropout=0.0)}
    path = tmp_path / "undropped.safetensors"
    save_model(path, MODEL | {"conditioning": section}, PARAMS)
    with pytest.raises(ValueError, match="so it has no guidance to learn"):
        make_task(distill(path))
