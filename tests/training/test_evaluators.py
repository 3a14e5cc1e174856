"""Evaluators: a validation loss that is the same on any devices and batches; bad input."""

import dataclasses
import logging
import types

import jax
import numpy as np
import pytest

import ldm_jax
from configs import autoencoder, txt2img
from ldm_jax import drawn_evaluators
from ldm_jax.data.scenes import SceneSource
from ldm_jax.drawn_evaluators import DRAWN
from ldm_jax.interop.files import write_safetensors
from ldm_jax.runtime.logging import read_metrics
from ldm_jax.runtime.mesh import make_mesh
from ldm_jax.training import steps as training_steps
from ldm_jax.training import validation
from ldm_jax.training.evaluators import WITH_PREVIEWS, DrawnEvaluator, make_evaluators
from ldm_jax.training.loop import train
from ldm_jax.training.tasks import make_task
from tests.metrics.clip_file import in_transformers_names
from tests.training.least_squares import Task, model, reports, steps
from tests.training.tiny import config as tiny_config

FEW = dict(kinds=5, held_out_scenes=3)


@pytest.fixture(scope="module")
def task():
    """A model of pixels that is told nothing, without attention: it compiles fast."""
    config = tiny_config("diffusion")
    with config.unlocked():
        config.conditioning = {}
        config.unet.context_dim = None
        config.unet.attention_resolutions = ()
        config.sampling.update(prompts=(), guidance=1.0)
    return make_task(config)


@pytest.fixture(scope="module")
def shapes(task):
    return jax.eval_shape(lambda: task.init(jax.random.key(0), {}))


@pytest.fixture(scope="module")
def params(shapes):
    """Random parameters, also where a network starts at zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: 0.2 * rng.standard_normal(p.shape, np.float32), shapes)


def asked(task, **options):
    """The task with options of its validation loss."""
    config = task.config.copy_and_resolve_references()
    config.evaluators.validation_loss.update(options)
    return dataclasses.replace(task, config=config)


# Intervals


def counting(every=0):
    """Evaluators that draw, of which `task` counts its calls, and a config that asks for it."""
    calls = []

    def measure(task, ema, options):
        calls.append(options)
        return {"objects": float(len(calls))}

    drawn = {"task": DrawnEvaluator(lambda *_: None, measure)}
    config = steps(12, **{"train.preview_every": 6, "train.checkpoint_every": 6})
    config.task = "diffusion"
    config.evaluators = {"task": {"every": every, "count": 3}}
    return config, drawn, calls


@pytest.fixture
def with_data(use):
    task = use(Task())
    task.held_out = {"loss": 1.0}
    return task


def test_each_evaluator_has_its_own_interval(with_data, tmp_path):
    config, drawn, calls = counting(every=5)
    assert train(config, tmp_path, drawn=drawn) == {"loss": 1.0}
    found = [(line["step"], line["objects"]) for line in reports(tmp_path, "task")]
    assert found == [(5, 1.0), (10, 2.0), (12, 3.0)], "and at the end"
    assert [line["step"] for line in reports(tmp_path, "held_out")] == [6, 12]
    assert calls[0] == {"every": 5, "count": 3, "steps": 20}
    assert "task/objects" in (tmp_path / "report.html").read_text()


def test_evaluators_change_nothing_in_training_and_compile_nothing_there(
    with_data, tmp_path, caplog
):
    for every in (0, 1):
        config, drawn, _ = counting(every)
        caplog.clear()
        train(config, tmp_path / str(every), drawn=drawn)
        assert caplog.text.count("Compiled the training step") == 1
    assert model(tmp_path / "0") == model(tmp_path / "1")


def test_a_resumed_run_reports_what_a_whole_one_does(with_data, tmp_path):
    config, drawn, _ = counting(every=5)
    config.train.steps = 6
    train(config, tmp_path, drawn=drawn)
    config, drawn, _ = counting(every=3)  # may differ
    train(config, tmp_path, drawn=drawn)
    assert [line["step"] for line in reports(tmp_path, "task")] == [5, 6, 9, 12]


def test_an_evaluator_that_fails_does_not_stop_training(with_data, tmp_path, caplog):
    def fail(*_):
        raise ValueError("features are not finite")

    config, _, _ = counting(every=6)
    with caplog.at_level(logging.WARNING):
        train(config, tmp_path, drawn={"task": DrawnEvaluator(lambda *_: None, fail)})
    assert "task could not be measured at step 6: features are not finite" in caplog.text
    assert (tmp_path / "model.safetensors").exists() and not reports(tmp_path, "task")


def test_the_validation_loss_can_be_off(with_data, tmp_path):
    config, drawn, _ = counting()
    config.evaluators = {"validation_loss": {"every": 0}}
    assert train(config, tmp_path, drawn=drawn) == {}
    assert not reports(tmp_path, "held_out")


# Bad input


BAD = {
    "a name": ({"distanse": {}}, "evaluators has no 'distanse': did you mean distance"),
    "a far name": ({"x": {}}, "evaluators has no 'x': choose one of validation_loss, "),
    "an option": ({"task": {"cuont": 3}}, "evaluators.task has no 'cuont': did you mean count"),
    "a negative interval": (
        {"task": {"every": -2}},
        "evaluators.task.every=-2: expected a whole number of at least -1"),
    "no number": ({"task": {"every": 1.5}}, "evaluators.task.every=1.5: expected a whole number"),
    "no pictures": ({"task": {"count": 0}}, "evaluators.task.count=0: .* at least 1"),
    "no path": ({"clip_score": {"path": 3}}, "evaluators.clip_score.path=3: expected a text"),
    "other pictures": (
        {"task": {"every": 1}},
        "evaluators.task judges drawn scenes, and data.source='emoji': use distance, or "),
    "of the other task": (
        {"reconstruction": {"every": 1}},
        "evaluators.reconstruction.every=1: task='diffusion' has no such evaluator; use 0, and "
        "for held-out data validation_loss"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_evaluators_are_refused_before_the_first_step(task, what):
    evaluators, message = BAD[what]
    config = task.config.copy_and_resolve_references()
    with config.unlocked():
        config.evaluators = evaluators
    with pytest.raises(ValueError, match=message):
        make_evaluators(config, task, DRAWN)


def test_evaluators_that_the_data_cannot_feed_are_refused(task, monkeypatch):
    config = task.config.copy_and_resolve_references()
    config.evaluators.novelty.every = 1
    nothing = dataclasses.replace(task, held_out=[])
    with pytest.raises(ValueError, match="evaluators.novelty: no data are held out"):
        make_evaluators(config, nothing, DRAWN)
    config.evaluators.novelty.every = 0
    config.evaluators.task.every = 1
    few = dataclasses.replace(task, held_out=SceneSource("held_out", 64, FEW))
    with pytest.raises(ValueError, match="evaluators.task.count=64: 3 scenes are held out"):
        make_evaluators(config, few, DRAWN)
    with pytest.raises(ValueError, match="evaluators.task draws pictures: train with train.py"):
        make_evaluators(config, task, {})
    config.evaluators.task.every = 0
    config.evaluators.validation_loss.every = 1
    with pytest.raises(ValueError, match="evaluators.validation_loss: no data are held out"):
        make_evaluators(config, nothing, DRAWN)
    config.evaluators.validation_loss.every = WITH_PREVIEWS
    config.evaluators.distance.every = 1
    monkeypatch.setattr("ldm_jax.metrics.efficientnet.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="evaluators.distance: the EfficientNet-Lite0 weights are"):
        make_evaluators(config, task, DRAWN)


def test_a_clip_score_needs_captions_and_a_clip(task, tmp_path):
    config = task.config.copy_and_resolve_references()
    config.evaluators.clip_score.every = 1
    with pytest.raises(ValueError, match="clip_score compares .* and this model is told nothing: "):
        make_evaluators(config, task, DRAWN)
    told = types.SimpleNamespace(needs=("caption", "crop"), network=None)
    told = types.SimpleNamespace(
        model=types.SimpleNamespace(embedders=(told,)),
        source=[0] * 300,
        held_out=[0] * 300,
        evaluate=None,
    )
    with pytest.raises(ValueError, match="clip_score.path is empty: name the file or folder of a"):
        make_evaluators(config, told, DRAWN)
    config.evaluators.clip_score.path = str(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="model.safetensors does not exist"):
        make_evaluators(config, told, DRAWN)
    write_safetensors(tmp_path / "model.safetensors", in_transformers_names())
    assert make_evaluators(config, told, DRAWN)[-1].kind == "clip_score"
    told.held_out = [0] * 3
    with pytest.raises(ValueError, match="clip_score.count=256: there are 3 held-out captions"):
        make_evaluators(config, told, DRAWN)
    told.held_out = []  # those of training
    assert make_evaluators(config, told, DRAWN)[-1].kind == "clip_score"


def test_reconstructions_need_features_for_their_distance(monkeypatch):
    config = autoencoder.get_config("smoke")
    config.evaluators.reconstruction.rfd = 1
    of_autoencoder = make_task(config)
    assert make_evaluators(config, of_autoencoder, {})[0].kind == "held_out"
    monkeypatch.setattr("ldm_jax.metrics.efficientnet.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="reconstruction.rfd: the EfficientNet-Lite0 weights are"):
        make_evaluators(config, of_autoencoder, {})


def test_a_run_that_is_refused_compiles_nothing(with_data, tmp_path, monkeypatch):
    monkeypatch.setattr(training_steps, "_compile_steps", lambda *_: pytest.fail("compiled"))
    config, _, _ = counting(every=1)
    with pytest.raises(ValueError, match="evaluators.task draws pictures: train with train.py"):
        train(config, tmp_path)
    assert not (tmp_path / "config.json").exists()


# The validation loss


@pytest.fixture(scope="module")
def on_one(task, params):
    return task._errors(params)


def assert_same(found, expected):
    """The loss to 1e-6, and each pair's error at each timestep but for rounding."""
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    loss, wanted = (validation.summary(errors)["loss"] for errors in (found, expected))
    assert loss == pytest.approx(wanted, rel=1e-6)


def test_the_validation_loss_does_not_depend_on_the_batch(task, params, on_one):
    other = asked(task, batch_size=5)
    found = other._errors(params)
    assert found.shape == (len(task.held_out), 8)
    assert_same(found, on_one)
    other.config.evaluators.validation_loss.count = 7
    assert_same(other._errors(params), on_one[:7])


def test_the_validation_loss_is_the_same_on_eight_devices(task, params, on_one):
    with jax.set_mesh(make_mesh({})):
        found = asked(task, batch_size=16)._errors(params)
    assert jax.device_count() == 8
    assert_same(found, on_one)


def test_the_validation_loss_of_a_network_that_predicts_nothing(task, shapes):
    """Of v the error is then the mean square of αε − σx₀."""
    zeros = jax.tree.map(lambda p: np.zeros(p.shape, np.float32), shapes)
    found = task._errors(zeros).mean(axis=0)
    schedule = task.model.diffusion.schedule
    levels = [schedule.level(np.int32(1000 * u)) for u in validation.TIMES]
    pictures = task.held_out.pictures
    images = np.stack([pictures[i]["image"] for i in range(len(pictures))])
    square = np.mean(np.square(images / 127.5 - 1.0))
    expected = [float(at.alpha**2 + at.sigma**2 * square) for at in levels]
    np.testing.assert_allclose(found, expected, rtol=0.06)


def test_each_timestep_has_noise_of_its_own(task, shapes):
    """A network that predicts nothing of ε has the error of ε alone, whatever the timestep."""
    diffusion = dataclasses.replace(task.model.diffusion, parameterization="eps")
    model = dataclasses.replace(task.model, diffusion=diffusion)
    zeros = jax.tree.map(lambda p: np.zeros(p.shape, np.float32), shapes)
    errors = dataclasses.replace(task, model=model)._errors(zeros)
    np.testing.assert_allclose(errors.mean(), 1.0, rtol=0.02)
    assert all(len(set(row)) == len(row) for row in errors)
    assert len(set(errors[:, 0])) == len(errors)


def test_the_summary_of_errors():
    """Pairs with means 1 and 3: the standard error of 2 is √2/√2."""
    errors = np.array([[0.0, 2.0] * 4, [2.0, 4.0] * 4])
    found = validation.summary(errors)
    assert (found["loss"], found["loss_error"]) == (2.0, pytest.approx(1.0))
    assert [found["loss_at_0"], found["loss_at_0.125"], found["loss_at_0.875"]] == [1.0, 3.0, 3.0]
    assert validation.summary(errors[:1])["loss_error"] == 0.0
    assert validation.summary(errors[:0]) == {}


# Drawn pictures


class Latents(types.SimpleNamespace):
    """A source of latents, which knows its pictures."""

    def __init__(self, pictures):
        super().__init__(pictures=pictures)

    def __len__(self):
        return 10


def test_what_is_drawn_and_compared(monkeypatch):
    """`task` draws held-out scenes; the others draw of the training pictures, without latents."""
    calls = []

    def measured(*given, **options):
        calls.append((given, options))
        metrics = {"fd": 1.0, "copied": 0.5, "novelty_p": 0.25}
        return types.SimpleNamespace(metrics=metrics)

    monkeypatch.setattr(drawn_evaluators, "load_clip", lambda path: f"the CLIP of {path}")
    monkeypatch.setattr(drawn_evaluators, "clip_metrics", measured)
    monkeypatch.setattr(drawn_evaluators, "scene_metrics", measured)
    monkeypatch.setattr(drawn_evaluators, "drawn_metrics", measured)
    read = []
    monkeypatch.setattr(drawn_evaluators, "load_extractor", lambda: "features")
    monkeypatch.setattr(
        drawn_evaluators, "real_pictures", lambda *given: read.append(given) or given[:2]
    )
    source, held_out = (Latents(name) for name in ("train", "held out"))
    fake = types.SimpleNamespace(
        source=source, held_out=held_out, conditions=(), pipelines=lambda ema: ["without", ema]
    )
    options = dict(every=1, count=2, steps=3, path="a file")
    found = {name: DRAWN[name].measure(fake, "averages", options) for name in DRAWN}
    assert found["distance"] == {"fd": 1.0}
    assert found["novelty"] == {"copied": 0.5, "novelty_p": 0.25}
    assert calls == [
        (("averages", "held out", 2, ()), {"steps": 3}),
        (("averages", "train", 2), {"real": ("train", ()), "steps": 3}),
        (("averages", "train", 2), {"real": ("train", "held out"), "steps": 3}),
        (
            ("averages", "held out", "the CLIP of a file"),
            {"count": 2, "conditions": (), "steps": 3},
        ),
    ]
    for _ in range(2):  # the real pictures are those that were read before
        DRAWN["distance"].measure(fake, "averages", options)
        DRAWN["novelty"].measure(fake, "averages", options)
    assert read == [
        (s, h, "features", {"split": "train"}) for s, h in (("train", ()), ("train", "held out"))
    ]


@pytest.mark.long
def test_drawn_scenes_are_judged_in_training(tmp_path):
    config = txt2img.get_config("demo")
    config.unet.update(model_channels=32, channel_mult=(1,), attention_resolutions=(1,))
    config.data.scenes.update(train_scenes=8, held_out_scenes=8)
    config.optimizer.update(name="adamw", lr=1e-3)
    config.train.update(steps=2, batch_size=8, log_every=1, preview_every=2, checkpoint_every=2)
    config.sampling.steps = 2
    config.evaluators.task.update(every=1, count=2, steps=1)
    write_safetensors(tmp_path / "clip.safetensors", in_transformers_names())
    path = str(tmp_path / "clip.safetensors")
    config.evaluators.clip_score.update(every=2, count=3, steps=1, path=path)
    found = ldm_jax.train(config, tmp_path)
    assert found.keys() == {"loss", "loss_error", *(f"loss_at_{u:g}" for u in validation.TIMES)}
    lines = [line for line in read_metrics(tmp_path) if line["kind"] == "task"]
    assert [line["step"] for line in lines] == [1, 2]
    assert 0.0 <= lines[0]["objects"] <= 1.0 and "real_objects" in lines[0]
    (scored,) = (line for line in read_metrics(tmp_path) if line["kind"] == "clip_score")
    assert scored["step"] == 2 and {"clip_score", "real_clip_score"} <= scored.keys()
