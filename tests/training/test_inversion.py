"""Textual inversion: what trains, what is written, where a run resumes, and what is refused."""

import functools
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import ldm_jax
from ldm_jax.conditions.tokenizer import BytePair
from ldm_jax.interop.embeddings import read_embeddings
from ldm_jax.interop.files import open_state
from ldm_jax.interop.native import save_model
from ldm_jax.runtime.logging import read_metrics
from ldm_jax.training.loop import train
from ldm_jax.training.optimizer import make_optimizer
from ldm_jax.training.state import init_state
from ldm_jax.training.tasks import make_task
from tests import tiny_models
from tests.conftest import ROOT
from tests.models.published import config_file
from tests.training.variants import photographs

MODEL = tiny_models.config(
    tiny_models.STABLE["conditioning"], channel_mult=[1], attention_resolutions=[1], context_dim=16
)
PARAMS = tiny_models.random_params(MODEL, scale=0.3)
TABLE = PARAMS["text"]["token_embedding"]["embedding"]
ROWS = "text/token_embedding/added_0"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "base.safetensors"
    save_model(path, MODEL, PARAMS)
    return path


def invert(base, **options):
    config = config_file(ROOT / "configs" / "textual_inversion.py").get_config("smoke")
    config.init_from = str(base)
    config.inversion.update(dict(start="red apple", vectors=3) | options)
    config.data.update(source="emoji", image_size=16, classes=("food & drink",), held_out=0.1)
    config.data.scenes = {}
    config.optimizer.update(lr=0.1, warmup=0)
    config.train.update(ema_decay=0.5)
    config.sampling.prompts = ("a <mine>", "a kiwi")
    return config


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """The files of a run whose vectors were moved by hand; nothing is compiled."""
    workdir, task = tmp_path_factory.mktemp("inversion"), make_task(invert(base))
    moved = jax.tree.map(lambda rows: rows + np.float32(0.1), task.loaded)
    about, params = task.export(moved)
    save_model(workdir / "model.safetensors", about, params)
    task.adapters.write(workdir / task.adapters.file, moved, task.resolved)
    return workdir


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A run of four steps, uninterrupted."""
    workdir = tmp_path_factory.mktemp("inversion") / "run"
    train(invert(base), workdir)
    return workdir


def ids(text):
    return BytePair().pieces([text])[0]


def test_only_the_new_vectors_train(base):
    config = invert(base)
    task = make_task(config)
    first, second = ids("red apple")
    expected = TABLE[[first, second, first]]
    optimizer = make_optimizer(config.optimizer, 4, task.adapters.networks)
    state = init_state(task, optimizer, 0, task.loaded)
    for tree in (state.params, state.ema):
        flat = flatten_dict(tree, sep="/")
        assert flat.keys() == {ROWS}
        np.testing.assert_array_equal(flat[ROWS], expected)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.size > 1]
    assert [leaf.shape for leaf in moments] == [(3, 16)] * 2
    kept = flatten_dict(task.frozen, sep="/")
    for path, leaf in flatten_dict(PARAMS, sep="/").items():
        np.testing.assert_array_equal(kept[path], leaf, err_msg=path)
    batch = next(task.batches(0))[1]
    size = len(TABLE)
    assert (batch["text"][:, 1:5] == [*ids("a"), size, size + 1, size + 2]).all()
    gradients = functools.partial(task.gradients, phase=None)
    grads, _ = jax.eval_shape(gradients, state.params, task.frozen, batch, jax.random.key(0))
    assert flatten_dict(grads, sep="/").keys() == {ROWS}


def test_gradients_are_those_of_the_rows_of_a_whole_table(base):
    """Closed form: with the vectors in the table itself, its gradient there, and nowhere else."""
    task = make_task(invert(base))
    network = task.model.embedders[0].network
    params = task.frozen["text"]
    tokens = task.model.embedders[0].prepare({"caption": ["a <mine> kiwi", "<mine>"]})
    whole = network.clone(vocab_size=len(TABLE) + 3, added=(), eos=len(TABLE) - 1)
    table = np.concatenate([TABLE, params["token_embedding"]["added_0"]])

    def of_rows(rows):
        own = params | {"token_embedding": params["token_embedding"] | {"added_0": rows}}
        return (network.apply({"params": own}, tokens).hidden ** 2).sum()

    def of_table(table):
        own = params | {"token_embedding": {"embedding": table}}
        return (whole.apply({"params": own}, tokens).hidden ** 2).sum()

    found, grads = jax.jit(jax.value_and_grad(of_rows))(table[-3:])
    expected, theirs = jax.jit(jax.value_and_grad(of_table))(table)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(grads, theirs[-3:], rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
    assert np.abs(grads).min() > 0


def test_what_was_trained_is_read_from_every_file(base, run):
    """From the workdir, and with the base from both formats."""
    plain, whole = ldm_jax.load(base), ldm_jax.load(run)
    rows = np.asarray(open_state(run / "model.safetensors")[ROWS])
    np.testing.assert_array_equal(rows, TABLE[[*ids("red apple"), *ids("red")]] + np.float32(0.1))
    assert set(open_state(run / "model.safetensors")) == {ROWS}
    for path in (run, run / "learned_embeds.safetensors", run / "a1111" / "mine.safetensors"):
        ((token, vectors),) = read_embeddings(path, MODEL)
        assert token == ("mine" if "a1111" in str(path) else "<mine>")
        np.testing.assert_array_equal(vectors["text"], rows)
    flat = flatten_dict(jax.device_get(whole.params), sep="/")
    np.testing.assert_array_equal(flat.pop(ROWS), rows)
    assert flat.keys() == flatten_dict(PARAMS, sep="/").keys()
    for path, leaf in flatten_dict(PARAMS, sep="/").items():
        np.testing.assert_array_equal(flat[path], leaf, err_msg=path)
    assert "base" not in whole.config
    named = plain.with_embedding(run)
    assert named.model.embedders == whole.model.embedders
    again = flatten_dict(jax.device_get(named.params), sep="/")
    assert again.keys() == flat.keys() | {ROWS}
    np.testing.assert_array_equal(again[ROWS], rows)


@pytest.mark.long
def test_previews_and_metrics_compare_with_the_first_words(trained):
    held_out = [line for line in read_metrics(trained) if line["kind"] == "held_out"][-1]
    assert held_out["loss"] != held_out["loss_of_base"]
    assert np.isfinite(held_out["loss_of_base"])
    preview = np.asarray(Image.open(trained / "previews" / "0000004.png"))
    half = len(preview) // 2
    assert (preview[:half] != preview[half:]).any()


def test_a_base_that_has_gone_or_changed_is_named(run, tmp_path):
    moved = tmp_path / "gone.safetensors"
    state = open_state(run / "model.safetensors")
    about = json.loads(state.metadata["config"])
    about["base"]["path"] = str(moved)
    copy = tmp_path / "run" / "model.safetensors"
    copy.parent.mkdir()
    save_model(copy, about, {path: state[path] for path in state})
    with pytest.raises(FileNotFoundError, match="an embedding of .* --embedding="):
        ldm_jax.load(copy.parent)
    save_model(moved, MODEL, tiny_models.random_params(MODEL, seed=1))
    with pytest.raises(ValueError, match="holds an embedding of .* where another model is now"):
        ldm_jax.load(copy.parent)


def test_captions_are_drawn_from_the_texts_or_are_the_pictures_own(base, tmp_path):
    config = invert(base, captions=("a {}", "the {} and {}"))
    task = make_task(config)
    captions = {c({"caption": ""}, np.random.default_rng(i))["caption"]
                for c in task.conditions for i in range(9)}  # fmt: skip
    assert captions == {"a <mine>", "the <mine> and <mine>"}
    folder = photographs(tmp_path / "pictures", count=4)
    config.data.update(source="folder", path=str(folder), classes=(), held_out=0.0)
    config.inversion.captions = ()
    with pytest.raises(ValueError, match="no caption contains '<mine>': write it into them"):
        make_task(config)
    for path in folder.rglob("*.txt"):
        path.write_text("my <Mine> in the sun")
    assert make_task(config).conditions == ()


@pytest.mark.parametrize("variant", ["sd15", "sdxl"])
def test_variants_of_published_models(variant, tmp_path):
    """Every text encoder gets the token, and the data feed all conditions: a step is traced."""
    model = {"sd15": tiny_models.STABLE, "sdxl": tiny_models.XL}[variant]
    save_model(tmp_path / "base.safetensors", model, tiny_models.random_params(model))
    config = config_file(ROOT / "configs" / "textual_inversion.py").get_config(variant)
    config.init_from = str(tmp_path / "base.safetensors")
    config.train.batch_size = 8
    config.data.path = str(photographs(tmp_path / "pictures", count=10))
    task = make_task(config)
    assert task.adapters.networks == {"sd15": ("text",), "sdxl": ("text", "text_2")}[variant]
    params = jax.eval_shape(task.init, jax.random.key(0), task.loaded)
    gradients = functools.partial(task.gradients, phase=None)
    batch = next(task.batches(0))[1]
    grads, _ = jax.eval_shape(gradients, params, task.frozen, batch, jax.random.key(0))
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    task.adapters.write(tmp_path / "out.safetensors", task.loaded, task.resolved)
    keys = set(open_state(tmp_path / "out.safetensors"))
    assert keys == {"sd15": {"<mine>"}, "sdxl": {"clip_l", "clip_g"}}[variant]


BAD = {
    "token": (dict(token=""), {}, "inversion.token='': choose a word, such as '<mine>'"),
    "exists": (dict(token="dog"), {}, "inversion.token: the model already has the token 'dog'"),
    "spaces": (dict(token="my dog"), {}, "inversion.token: a token is a word without spaces"),
    "vectors": (dict(vectors=0), {}, "inversion.vectors=0: choose a whole number above 0"),
    "many": (dict(vectors=76), {}, "76 vectors of '<mine>', and a prompt has room for 75"),
    "start": (dict(start=""), {}, "inversion.start='': name words that the model knows"),
    "captions": (dict(captions=("a",)), {}, "inversion.captions: 'a' has no {} for the token"),
    "option": (dict(rank=4), {}, "inversion has no option 'rank'; it has token, vectors, start"),
    "nothing to invert": ({}, dict(init_from=""), "name it with init_from=PATH"),
    "what trains": ({}, dict(trainable=("^unet/",)), "leave trainable at its default"),
    "task": ({}, dict(task="autoencoder"), "models of task='diffusion', not task='autoencoder'"),
    "lora": ({}, dict(adapters=dict(rank=4)), "remove one of the two sections"),
    "prior": ({}, dict(prior=dict(prompt="a dog")), "needs no prior.prompt: remove it"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_train_is_refused_in_a_sentence(what, base):
    options, settings, message = BAD[what]
    config = invert(base)
    with config.unlocked():
        config.inversion.update(options)
        config.update(settings)
    with pytest.raises(ValueError, match=message):
        make_task(config)


def test_a_model_without_prompts_is_refused(tmp_path):
    path = tmp_path / "labels.safetensors"
    save_model(path, tiny_models.LABELS, tiny_models.random_params(tiny_models.LABELS))
    with pytest.raises(ValueError, match="inversion is of models that take prompts; this one"):
        make_task(invert(path))
