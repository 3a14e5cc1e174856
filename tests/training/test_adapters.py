"""LoRA training: the formula, what trains, what is written, and what is refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

import ldm_jax
from ldm_jax.interop.changes import separated
from ldm_jax.interop.files import open_state
from ldm_jax.interop.lora_writer import write_lora
from ldm_jax.interop.native import save_model
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.low_rank import DOWN, MAGNITUDE, SCALE, UP
from ldm_jax.runtime.logging import read_metrics
from ldm_jax.training.adapters import Options, make_adapters
from ldm_jax.training.loop import train
from ldm_jax.training.optimizer import make_optimizer
from ldm_jax.training.state import init_state
from ldm_jax.training.tasks import make_task
from ldm_jax.training.trainable import merge
from tests import tiny_models
from tests.conftest import ROOT
from tests.models.published import config_file
from tests.training.variants import photographs

MODEL = tiny_models.config(
    tiny_models.STABLE["conditioning"],
    channel_mult=[1],
    attention_resolutions=[1],
    context_dim=16,
)
TARGETS = (r"^unet/.*/attn[12]/", r"^unet/.*/in_layers_2/", r"^text/.*self_attn/[qv]_proj")
OPTIONS = {
    "lora": dict(alpha=6.0),
    "rslora": dict(alpha=3.0, rslora=True),
    "dora": dict(alpha=6.0, kind="dora"),
}
PARAMS = tiny_models.random_params(MODEL)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A file of Stable Diffusion 1, tiny and random."""
    path = tmp_path_factory.mktemp("model") / "base.safetensors"
    save_model(path, MODEL, PARAMS)
    return path


def lora(base, **options):
    config = config_file(ROOT / "configs" / "lora.py").get_config("smoke")
    config.init_from = str(base)
    config.adapters.update(dict(targets=TARGETS, rank=4) | options)
    config.data.update(source="emoji", image_size=16, classes=("food & drink",), held_out=0.1)
    config.data.scenes = {}
    config.optimizer.update(lr=0.05, warmup=0)
    config.train.update(ema_decay=0.5)
    config.sampling.prompts = ("a pear", "a kiwi")
    return config


def adapters(**options):
    """Adapters of MODEL; its parameters, which do not train, and those that do, not at 0."""
    made, frozen, loaded = make_adapters(
        Options(targets=TARGETS, rank=3, **options), PARAMS, MODEL, "base", ""
    )
    factors = made.init(jax.random.key(0), frozen, loaded)
    leaves, rng = flatten_dict(factors, sep="/"), np.random.default_rng(0)
    for path, leaf in leaves.items():
        noise = 0.3 * rng.standard_normal(leaf.shape, np.float32)
        leaves[path] = leaf + noise * (np.abs(leaf) if path.endswith(MAGNITUDE) else 1.0)
    return made, frozen, unflatten_dict(leaves, sep="/")


@functools.cache
def loss():
    """Of parameters, with or without factors, on fixed numbers: (loss, gradient)."""
    model, rng = LatentDiffusion.from_config(MODEL), np.random.default_rng(1)
    latents = rng.standard_normal((4, 8, 8, 4)).astype(np.float32)
    inputs = {e.name: e.prepare({"caption": ["a", "b c", "", "d"]}) for e in model.embedders}

    def measured(params):
        return jnp.mean(model.loss(params, latents, inputs, jax.random.key(2)))

    return measured


@functools.cache
def before():
    return jax.jit(loss())(PARAMS)


def formula(frozen, factors, scale, kind):
    """The parameters with changed kernels, by the formulas of the papers."""
    flat, changed = flatten_dict(frozen, sep="/"), flatten_dict(factors, sep="/")
    for path in [path for path in changed if path.endswith(DOWN)]:
        layer = path.removesuffix(DOWN)
        down, up = changed[path], changed[layer + UP]
        product = jnp.einsum("...ir,ro->...io", down, up, precision="highest")
        kernel = flat[f"{layer}kernel"] + scale * product
        if kind == "dora":
            norm = jnp.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), axis=0)
            kernel = changed[layer + MAGNITUDE] * kernel / jax.lax.stop_gradient(norm)
        flat[f"{layer}kernel"] = kernel
    return unflatten_dict({p: v for p, v in flat.items() if not p.endswith(SCALE)}, sep="/")


@functools.partial(jax.jit, static_argnames="kind")
def by_layers(frozen, factors, kind):
    return jax.value_and_grad(lambda f: loss()(merge(frozen, f)))(factors)


@functools.partial(jax.jit, static_argnames="kind")
def by_formula(frozen, factors, scale, kind):
    return jax.value_and_grad(lambda f: loss()(formula(frozen, f, scale, kind)))(factors)


@pytest.mark.parametrize("kind", OPTIONS)
def test_loss_and_gradient_are_those_of_the_formula(kind):
    options, decomposed = OPTIONS[kind], "dora" if kind == "dora" else "lora"
    _, frozen, factors = adapters(**options)
    scale = np.float32(options["alpha"] / (3**0.5 if kind == "rslora" else 3))
    found, grads = by_layers(frozen, factors, decomposed)
    expected, theirs = by_formula(frozen, factors, scale, decomposed)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert abs(found - before()) > 1e-3
    grads, theirs = flatten_dict(grads, sep="/"), flatten_dict(theirs, sep="/")
    largest = max(np.abs(grad).max() for grad in theirs.values())
    for path, grad in theirs.items():
        np.testing.assert_allclose(grads[path], grad, atol=1e-5 * largest, err_msg=path)
        assert np.abs(grad).max() > 0, path


@pytest.mark.parametrize("kind", OPTIONS)
def test_at_step_0_nothing_is_changed(kind):
    made, frozen, _ = adapters(**OPTIONS[kind])
    _, _, loaded = make_adapters(made.options, PARAMS, MODEL, "base", "")
    factors = made.init(jax.random.key(0), frozen, loaded)
    after, _ = by_layers(frozen, factors, "dora" if kind == "dora" else "lora")
    if kind == "dora":  # norms are rounded
        assert float(after) == pytest.approx(float(before()), rel=1e-5)
    else:
        assert after == before()


def test_only_factors_train(base):
    config = lora(base, kind="dora")
    task = make_task(config)
    optimizer = make_optimizer(config.optimizer, 4, task.adapters.networks)
    state = jax.eval_shape(lambda: init_state(task, optimizer, 0, task.loaded))
    paths = flatten_dict(state.params, sep="/").keys()
    names = {path.rpartition("/")[2] for path in paths}
    assert names == {DOWN, UP, MAGNITUDE}
    assert {path.partition("/")[0] for path in paths} == {"unet", "text"}
    assert flatten_dict(state.ema, sep="/").keys() == paths
    sizes = {leaf.shape for leaf in jax.tree.leaves(state.params)} | {()}
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state)]
    assert {leaf.shape for leaf in moments} <= sizes
    assert sum(leaf.size > 1 for leaf in moments) == 2 * len(paths)
    grads, _ = jax.eval_shape(
        functools.partial(task.gradients, phase=None),
        state.params, task.frozen, next(task.batches(0))[1], jax.random.key(0),
    )  # fmt: skip
    assert flatten_dict(grads, sep="/").keys() == paths
    kept = flatten_dict(task.frozen, sep="/")
    for path, leaf in flatten_dict(PARAMS, sep="/").items():
        np.testing.assert_array_equal(kept[path], leaf, err_msg=path)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run of four steps, uninterrupted."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    train(lora(base), workdir)
    return workdir


def pictures(pipe):
    return pipe(["a pear", "a kiwi"], steps=2, seed=3)


def test_what_was_trained_is_drawn_from_every_file(base, run, tmp_path):
    """From the workdir, from the LoRA file in both layouts, and from the state."""
    plain, adapted = ldm_jax.load(base), ldm_jax.load(run)
    state = open_state(run / "model.safetensors")
    factors = unflatten_dict({path: state[path] for path in state}, sep="/")
    options = lora(base, layout="peft").adapters
    peft = tmp_path / "peft.safetensors"
    write_lora(peft, factors, MODEL, options.alpha, layout="peft")
    _, trained = separated(merge(plain.params, factors))
    from_state = pictures(dataclasses.replace(plain, loras=((trained, 1.0),)))
    for path in (run, peft):
        np.testing.assert_array_equal(pictures(plain.with_lora(path)), from_state)
    np.testing.assert_allclose(pictures(adapted), from_state, atol=1 / 255)
    assert np.abs(pictures(plain) - from_state).max() > 2 / 255
    assert "base" not in adapted.config


def test_previews_and_metrics_compare_with_the_base(base, run):
    held_out = [line for line in read_metrics(run) if line["kind"] == "held_out"][-1]
    assert held_out["loss"] < held_out["loss_of_base"]
    preview = np.asarray(Image.open(run / "previews" / "0000004.png"))
    task = make_task(lora(base))
    factors = jax.eval_shape(task.init, jax.random.key(0), task.loaded)
    unchanged = task.preview(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), factors))
    half = len(preview) // 2
    np.testing.assert_array_equal(preview[:half], unchanged[:half])
    assert (preview[half:] != unchanged[half:]).any()


def test_a_base_that_has_gone_or_changed_is_named(base, run, tmp_path):
    moved = tmp_path / "gone.safetensors"
    about = json.loads(open_state(run / "model.safetensors").metadata["config"])
    about["base"]["path"] = str(moved)
    state = open_state(run / "model.safetensors")
    copy = tmp_path / "run" / "model.safetensors"
    copy.parent.mkdir()
    save_model(copy, about, {path: state[path] for path in state})
    with pytest.raises(FileNotFoundError, match=f"a LoRA of {moved}, which is not there: move it"):
        ldm_jax.load(copy.parent)
    save_model(moved, MODEL, tiny_models.random_params(MODEL, seed=1))
    with pytest.raises(ValueError, match="where another model is now: put the former there"):
        ldm_jax.load(copy.parent)
    save_model(moved, MODEL, PARAMS)
    kernel = ldm_jax.load(copy.parent, dtype="bfloat16").params["unet"]["out_2"]["kernel"]
    assert kernel.dtype == jnp.bfloat16


def test_text_states_are_kept_where_no_text_encoder_has_factors(base):
    config = lora(base, targets=TARGETS[:1])
    config.text_states = "memory"
    assert make_task(config).adapters.networks == ("unet",)
    config.adapters.targets = TARGETS
    with pytest.raises(ValueError, match="none is frozen"):
        make_task(config)


@pytest.mark.parametrize("variant", ["sd15", "sdxl"])
def test_variants_of_published_models(variant, tmp_path):
    """Their targets are there, and the data feed all conditions: a step is traced."""
    model = {"sd15": tiny_models.STABLE, "sdxl": tiny_models.XL}[variant]
    save_model(tmp_path / "base.safetensors", model, tiny_models.random_params(model))
    config = config_file(ROOT / "configs" / "lora.py").get_config(variant)
    config.init_from = str(tmp_path / "base.safetensors")
    config.train.batch_size = 8
    config.data.path = str(photographs(tmp_path / "pictures", count=10))
    task = make_task(config)
    networks = {"sd15": ("unet",), "sdxl": ("text", "text_2", "unet")}[variant]
    assert tuple(sorted(task.adapters.networks)) == networks
    kinds = {path.split("/")[-3] for path in task.adapters.kernels}
    assert kinds == {"attn1", "attn2"} | ({"self_attn"} if variant == "sdxl" else set())
    params = jax.eval_shape(task.init, jax.random.key(0), task.loaded)
    grads, _ = jax.eval_shape(
        functools.partial(task.gradients, phase=None),
        params, task.frozen, next(task.batches(0))[1], jax.random.key(0),
    )  # fmt: skip
    assert jax.tree.structure(grads) == jax.tree.structure(params)


BAD = {
    "targets": (
        dict(targets=("attention",)), {},
        r"nothing matches 'attention'; paths look like '.*/kernel', and the layers are of .*to_q"),
    "no targets": (dict(targets=()), {}, "there are none; paths look like"),
    "rank 0": (dict(rank=0), {}, "adapters.rank=0: choose a whole number above 0"),
    "rank": (
        dict(rank=17), {},
        r"rank=17: text/.*_proj/kernel of shape \(16, 16\) has at most rank 16; choose a smaller"),
    "alpha": (dict(alpha=0.0), {}, "adapters.alpha=0.0: choose a number above 0"),
    "kind": (dict(kind="loha"), {}, "adapters.kind='loha': choose one of lora, dora"),
    "layout": (dict(layout="a1111"), {}, "adapters.layout='a1111': choose one of kohya, peft"),
    "nothing to adapt": ({}, dict(init_from=""), "name it with init_from=PATH"),
    "what trains": ({}, dict(trainable=("^unet/",)), "leave trainable at its default"),
    "task": ({}, dict(task="autoencoder"), "models of task='diffusion', not task='autoencoder'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_train_is_refused_in_a_sentence(what, base):
    options, settings, message = BAD[what]
    config = lora(base, **options)
    config.update(settings)
    with pytest.raises(ValueError, match=message):
        make_task(config)
