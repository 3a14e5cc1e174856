"""A variant of each kind trains, from data to a drawn picture, or is refused."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import ldm_jax
from ldm_jax.evaluation import evaluate
from ldm_jax.training.tasks import make_task
from tests.conftest import ROOT
from tests.models.published import config_file
from tests.training.variants import SIZE, names, photographs, reduced

REFUSED = {"published:taesd": "autoencoder.kind='tiny' imitates the latents of a larger"}
SHORT = ("published:taesd", "published:sgm-mnist_cond")  # `make long` has the others
# One of each kind. The others differ from these in numbers, or in conditions that
# tests/test_pipeline_kinds.py draws with: tests/training/test_abstract.py traces all, and
# tests/training/test_resuming.py trains the smallest of each config.
TRAINED = ("autoencoder:decoder", "autoencoder:vq", "txt2img:meanflow")
TRAINED += tuple(
    f"published:{name}"
    for name in (*("taesd", "rdm768", "sd2-upscaler", "sdxl-base", "sgm-mnist_cond", "mlperf_sd2"),)
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("photographs"))


def drawn(model, rng):
    """One picture of a loaded model, with all its conditions."""
    if isinstance(model, ldm_jax.FirstStage):
        return model.decode(model.encode(rng.random((1, SIZE, SIZE, 3))))
    needs = {entry for e in model.model.embedders for entry in e.needs}
    asked = {"prompt": "a picture"} if "caption" in needs else {}
    asked |= {"labels": 0} if "label" in needs else {}
    side = SIZE // model.autoencoder.downsampling
    told = {embedder.name: embedder for embedder in model.model.embedders}
    enlarged = getattr(getattr(told.get("low_resolution"), "network", None), "factor", 1) * side
    arrays = {
        "low_resolution": (1, enlarged, enlarged, 3),
        "neighbours": (1, 4, 32),
    }
    conditions = {n: rng.standard_normal(s) for n, s in arrays.items() if n in needs}
    conditions |= {"noise_level": np.array([20])} if "noise_level" in needs else {}
    return model(**asked, conditions=conditions, steps=1, guidance=1.0)


@pytest.mark.parametrize(
    "name",
    [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in TRAINED],
)
def test_variant(name, pictures, tmp_path):
    file, _, variant = name.partition(":")
    config = config_file(ROOT / "configs" / f"{file}.py").get_config(variant)
    config = reduced(config, pictures, tmp_path)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            ldm_jax.train(config, tmp_path / "run")
        return
    metrics = ldm_jax.train(config, tmp_path / "run")
    assert np.isfinite(list(metrics.values())).all() and metrics
    image = drawn(ldm_jax.load(tmp_path / "run"), np.random.default_rng(0))
    assert image.shape[1:3] == (SIZE, SIZE) and np.isfinite(image).all()
    if config.data.source == "scenes":
        judged, images = evaluate(tmp_path / "run", count=2, steps=1)
        assert images.shape == (2, SIZE, SIZE, 3)
        assert any(name.startswith("real_") for name in judged)


@pytest.mark.parametrize(
    ("file", "fresh"),
    [
        ("class2img", ()),
        ("layout", ()),
        # Without a context, attention is of another kind.
        *((name, ("qkv",)) for name in ("inpaint", "superres", "semantic", "unconditional")),
    ],
)
def test_tasks_of_scenes_start_from_the_bundled_unet(file, fresh):
    config = config_file(ROOT / "configs" / f"{file}.py").get_config()
    config.data.scenes.update(train_scenes=8, held_out_scenes=8)
    task = make_task(config)
    wanted = flatten_dict(jax.eval_shape(task.init, jax.random.key(0), task.loaded)["unet"])
    fresh_leaves = wanted.keys() - flatten_dict(task.loaded["unet"]).keys()
    assert {leaf[-2] for leaf in fresh_leaves} == set(fresh)


def test_the_table_of_variants_has_all_of_them():
    table = (ROOT / "docs" / "models.md").read_text().partition("## Configurations")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    words = {word for row in rows for word in row.split("|")[1].replace(",", " ").split()}
    assert {name.partition(":")[2] for name in names(ROOT)} <= words
    refused = {name.partition(":")[2] for name in REFUSED}
    marked = {row.split("|")[1].strip() for row in rows if row.split("|")[2].startswith(" refused")}
    assert marked == refused


def test_a_preview_without_prompts_has_two_whole_rows(pictures, tmp_path):
    """Of an unconditional model, five columns; the model's parameters do not matter."""
    config = config_file(ROOT / "configs" / "unconditional.py").get_config("smoke")
    task = make_task(reduced(config, pictures, tmp_path))
    shown = task.preview(task.init(jax.random.key(0), {}))
    assert shown.shape == (2 * (SIZE + 2) - 2, 5 * (SIZE + 2) - 2, 3)
