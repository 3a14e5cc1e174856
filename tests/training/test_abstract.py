"""Tasks of shapes alone are those of real data and weights, and nothing is read for them.

So every variant of every config but those that are `REFUSED` is traced: its data, and the loss and
gradients of a step. tests/training/test_variants.py has those two.
"""

import jax
import numpy as np
import pytest

from ldm_jax.data.conditions import make_conditions
from ldm_jax.runtime.mesh import make_mesh
from ldm_jax.runtime.meters import model_flops
from ldm_jax.training.abstract import batch_shapes, blank_example
from ldm_jax.training.program import abstract_state, lower_sampler, lower_step
from ldm_jax.training.tasks import make_task
from tests.conftest import ROOT
from tests.models.published import CONFIGS, config_file
from tests.training.variants import names, photographs, reduced

REFUSED = ("published:taesd", "published:rdm768")
SHORT = ("txt2img:smoke", "autoencoder:smoke", "inpaint:smoke")  # `make long` has the others


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("photographs"))


def described(tree):
    def about(leaf):
        return np.shape(leaf), jax.dtypes.canonicalize_dtype(leaf.dtype)

    return jax.tree.map(about, tree)


def variant(name):
    file, _, variant = name.partition(":")
    return config_file(ROOT / "configs" / f"{file}.py").get_config(variant)


@pytest.mark.parametrize(
    "name",
    [
        name if name in SHORT else pytest.param(name, marks=pytest.mark.long)
        for name in names(ROOT)
        if name not in REFUSED
    ],
)
def test_the_shapes_are_those_of_a_real_task(name, pictures, tmp_path):
    config = reduced(variant(name), pictures, tmp_path)
    real = make_task(config)
    if config.data.source == "folder":  # classes of a folder are not known without it
        for section in real.resolved["conditioning"] if config.task == "diffusion" else ():
            if config.conditioning[section].kind == "class":
                network = real.resolved["conditioning"][section]["network"]
                config.conditioning[section].network.n_classes = network["n_classes"]
        config.data.path = str(tmp_path / "nothing")
    config.init_from = ""
    if "first_stage" in config:
        config.first_stage = ""
    task = make_task(config, abstract=True)
    _, batch = next(real.batches(0))
    assert described(batch_shapes(task, config.train.batch_size)) == described(batch)
    assert described(task.frozen) == described(real.frozen)
    loaded = jax.eval_shape(real.init, jax.random.key(0), real.loaded)
    assert described(abstract_state(task, config)[1].params) == described(loaded)
    for phase in {task.phase(0), task.phase(1)}:
        grads, metrics = jax.eval_shape(
            lambda *arguments, phase=phase: task.gradients(*arguments, phase),
            loaded, task.frozen, batch, jax.random.key(0),
        )  # fmt: skip
        assert described(grads) == described(loaded)
        assert metrics["loss"].shape == ()


@pytest.mark.parametrize("how", ["memory", "shards"])
def test_kept_text_states(pictures, tmp_path, how):
    """The features of a frozen encoder are a part of the batch, and their null is traced."""
    config = reduced(variant("published:sd1"), pictures, tmp_path)
    config.update(text_states=how, latents=how, cache="/nowhere", first_stage="", init_from="")
    config.data.path = ""
    task = make_task(config, abstract=True)
    shapes = batch_shapes(task, 8)
    assert described(shapes["moments"]) == ((8, 8, 8, 8), np.float32)
    assert described(shapes["text"].context) == ((8, 77, 32), np.float32)
    params = jax.eval_shape(task.init, jax.random.key(0), {})
    grads, _ = jax.eval_shape(
        lambda *arguments: task.gradients(*arguments, None),
        params, task.frozen, shapes, jax.random.key(0),
    )  # fmt: skip
    assert described(grads) == described(params)


def test_the_whole_of_stable_diffusion_2_needs_no_memory():
    task = make_task(CONFIGS.get_config("sd2"), abstract=True)
    leaves = jax.tree.leaves(task.frozen)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == 340_387_840 + 83_653_863  # its text and autoencoder


def test_classes_that_only_the_data_know():
    config = variant("class2img:smoke")
    config.data.update(source="folder", path="/nowhere")
    with pytest.raises(ValueError, match="n_classes=0 stands for the number .* without the data"):
        make_task(config, abstract=True)


def test_an_array_of_unknown_length():
    config = CONFIGS.get_config("rdm768")
    task = make_task(config, abstract=True)
    with pytest.raises(ValueError, match=r"neighbours.shape=\(None, 768\) leaves a side open"):
        batch_shapes(task, 1)


def test_blank_conditions_are_of_the_pictures_size():
    conditions = make_conditions({"depth": {"factor": 8}, "mask": {}, "boxes": {}, "sizes": {}})
    example = blank_example(64, conditions, ())
    assert example["depth"].shape == (8, 8, 1)
    assert example["mask"].shape == (64, 64, 1)
    assert example["boxes"].shape == (92,)
    assert list(example["target_size"]) == [64, 64]


def test_a_step_and_a_sampler_on_a_mesh():
    """Shapes alone lower; a sampler's FLOPs grow by the same number with each of its steps."""
    config = variant("txt2img:smoke")
    task, mesh = make_task(config, abstract=True), make_mesh(dict(data=2, fsdp=4))
    step = lower_step(task, config, mesh)
    _, state = abstract_state(task, config)
    batch = batch_shapes(task, 8)
    gradients = model_flops(
        lambda *arguments: task.gradients(*arguments, None),
        state.params, task.frozen, batch, jax.random.key(0),
    )  # fmt: skip
    assert (step.images, step.flops) == (8, gradients)  # without those of Muon
    one, two, three = (lower_sampler(task, config, mesh, 16, n) for n in (1, 2, 3))
    assert three.images == 16
    assert three.flops - two.flops == two.flops - one.flops > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_sampler_s_parameters_have_the_type_of_the_networks(precision):
    config = variant("txt2img:smoke")
    config.precision = precision
    lowered = lower_sampler(make_task(config, abstract=True), config, make_mesh({}), 8, 1).lowered
    weights = lowered.args_info[0][0]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(weights)} == {precision}


@pytest.mark.parametrize("setting", [dict(remat="blocks"), dict(accumulate=2)], ids=str)
def test_the_models_flops_are_those_of_the_plain_step(setting):
    def flops(**settings):
        config = variant("txt2img:smoke")
        config.train.update(settings)
        task = make_task(config, abstract=True)
        params = jax.eval_shape(task.init, jax.random.key(0), {})
        arguments = params, task.frozen, batch_shapes(task, 8), jax.random.key(0)
        return model_flops(lambda *arguments: task.gradients(*arguments, None), *arguments)

    assert flops(**setting) == flops() > 0
