"""Aspect-ratio buckets: shapes, the order of batches, and training on them."""

from collections import Counter

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import common, txt2img
from ldm_jax.data.buckets import Grouped, bucket_shapes, nearest_bucket
from ldm_jax.data.loader import Loader
from ldm_jax.data.sources import open_source
from ldm_jax.training import loop, steps
from ldm_jax.training.tasks import make_task

SIZES = {"wide": (160, 90), "tall": (60, 90), "square": (80, 80)}  # (width, height)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven wide, five tall and eight square pictures, one of a kind for each class."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, count in {"wide": 11, "tall": 5, "square": 8}.items():
        (root / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (*SIZES[name][::-1], 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def data(folder, **fields):
    given = dict(source="folder", path=str(folder), held_out=0.0, buckets=True, min_size=8)
    return ConfigDict(common.data(**given | fields))


@pytest.mark.parametrize("size", [64, 100, 256, 512, 768, 1024])
def test_shapes_have_about_the_area_and_few_programs(size):
    shapes = bucket_shapes(size)
    assert len(shapes) <= 7 and len(set(shapes)) == len(shapes)
    assert set(shapes) == {shape[::-1] for shape in shapes}
    multiple = min(64, 2 ** int(np.log2(size / 8)))
    for height, width in shapes:
        assert height % multiple == width % multiple == 0
        assert height * width == pytest.approx(size**2, rel=0.17)


def test_known_shapes():
    tall = {(1344, 768), (1280, 832), (1152, 896)}  # of SDXL's own list
    assert set(bucket_shapes(1024)) == tall | {s[::-1] for s in tall} | {(1024, 1024)}


@pytest.mark.parametrize(
    "shape, nearest",
    [
        ((1080, 1920), (768, 1344)),
        ((3000, 2000), (1280, 832)),
        ((100, 101), (1024, 1024)),
        ((50, 500), (768, 1344)),
    ],
)
def test_the_nearest_aspect_ratio(shape, nearest):
    shapes = bucket_shapes(1024)
    assert shapes[nearest_bucket(shape, shapes)] == nearest


@pytest.mark.parametrize("counts", [(11, 5, 8), (1, 100), (3, 3, 3), (640,), (2, 1)])
@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_batches_are_of_one_group_and_examples_equally_often(counts, batch_size):
    groups = np.repeat(np.arange(len(counts)), counts)
    order = Grouped(np.random.default_rng(3).permutation(groups), batch_size, (0,))
    shuffled = np.random.default_rng(3).permutation(groups)
    steps, shown = 40 * sum(counts) // batch_size, Counter()
    for step in range(steps):
        indices = order.indices(step, range(batch_size))
        assert len(set(shuffled[indices])) == 1
        shown.update(indices)
    assert len(shown) == sum(counts)
    # Within a group by one pass; between groups by the batches that an epoch rounds away.
    expected = steps * batch_size / sum(counts)
    for group, count in enumerate(counts):
        times = [shown[i] for i in np.flatnonzero(shuffled == group)]
        assert max(times) - min(times) <= max(1, -(-batch_size // count))
        assert abs(np.mean(times) - expected) <= 1 + len(counts) * batch_size / count


def test_the_order_depends_on_seed_and_step_alone():
    groups = np.repeat([0, 1, 2], (11, 5, 8))
    one, same, other = (Grouped(groups, 4, (seed,)) for seed in (0, 0, 1))
    steps = [37, 2, 1000, 5, 2]
    assert [one.indices(s, range(4)) for s in steps] == [same.indices(s, range(4)) for s in steps]
    assert [one.indices(s, range(4)) for s in steps] != [other.indices(s, range(4)) for s in steps]
    halves = one.indices(9, range(2)) + one.indices(9, range(2, 4))
    assert halves == one.indices(9, range(4))


def test_pictures_keep_their_aspect_ratio(folder):
    source = open_source(data(folder))
    assert set(source.shapes) == {(48, 88), (64, 64), (80, 56)}
    for i in range(len(source)):
        example = source[i]
        kind = source.classes[example["label"]]
        shape = {"wide": (48, 88), "square": (64, 64), "tall": (80, 56)}[kind]
        assert example["image"].shape == (*shape, 3)
        assert example["placement"].size == shape
        assert example["placement"].original == SIZES[kind][::-1]
    kept = open_source(data(folder, classes=("tall",)))
    assert {kept[i]["image"].shape for i in range(len(kept))} == {(80, 56, 3)}
    assert len(kept.groups) == len(kept) == 5
    # What is held out is measured on squares.
    out = open_source(data(folder, held_out=0.3), "held_out")
    assert {out[i]["image"].shape for i in range(len(out))} == {(64, 64, 3)}


def test_the_middle_is_kept(tmp_path):
    """Of a picture that is wider than its bucket, both sides are cut alike."""
    ramp = np.zeros((64, 400, 3), np.uint8)
    ramp[:, 150:250] = 255
    Image.fromarray(ramp).save(tmp_path / "a.png")
    image = open_source(data(tmp_path))[0]["image"]
    np.testing.assert_allclose(image.astype(int), image[:, ::-1], atol=1)
    assert image[:, 40:48].min() == 255 and image.shape == (48, 88, 3)


def test_a_broken_picture_is_replaced_in_its_own_shape(folder, tmp_path):
    for path in folder.glob("*/[01].png"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        content = path.read_bytes()
        broken = path.name == "1.png" or path.parent.name == "tall"
        (tmp_path / path.parent.name / path.name).write_bytes(content[: 200 if broken else None])
    source = open_source(data(tmp_path))
    shapes = [source[i]["image"].shape[:2] for i in range(len(source))]
    assert shapes == [source.shapes[group] for group in source.groups]
    assert len(set(shapes)) == 3


def test_the_loader_gives_batches_of_one_shape(folder):
    source = open_source(data(folder))
    loader = Loader(source, 4, seed=0)
    shapes = Counter(loader.batch(step)["image"].shape for step in range(24))
    assert set(shapes) == {(4, 48, 88, 3), (4, 64, 64, 3), (4, 80, 56, 3)}
    parts = [Loader(source, 4, seed=0, process_index=i, process_count=2) for i in (0, 1)]
    halves = np.concatenate([part.batch(5)["image"] for part in parts])
    np.testing.assert_array_equal(halves, loader.batch(5)["image"])


def config(folder, **fields):
    config = txt2img.get_config("smoke")
    config.data = data(folder, **fields)
    config.latents = "step"
    config.train.update(batch_size=8, steps=12, log_every=4, checkpoint_every=12, preview_every=12)
    return config


@pytest.mark.long
def test_training_compiles_a_step_for_each_shape(folder, tmp_path, monkeypatch):
    compiled, compile_steps = [], steps._compile_steps

    def count(run, call):
        compiled.append(call.batches[0]["image"].shape)
        return compile_steps(run, call)

    monkeypatch.setattr(steps, "_compile_steps", count)
    loop.train(config(folder), tmp_path)
    assert len(compiled) == len(set(compiled)) == 3
    assert {shape[1:3] for shape in compiled} == {(48, 88), (64, 64), (80, 56)}


def test_the_summary_counts_the_shapes(folder, tmp_path, caplog):
    with caplog.at_level("INFO"):
        loop.train(config(folder), tmp_path, dry_run=True)
    (line,) = [r.message for r in caplog.records if r.message.startswith("Data: ")]
    assert "11 of 48 × 88, 8 of 64 × 64, 5 of 80 × 56" in line


def test_what_cannot_have_buckets(folder):
    with pytest.raises(ValueError, match="data.buckets: pictures of data.source='emoji' are squa"):
        open_source(ConfigDict(common.data(buckets=True)))
    memory = config(folder)
    memory.latents = "memory"
    with pytest.raises(ValueError, match="data.buckets: latents='memory' keeps latents of one"):
        make_task(memory)
    autoencoder = config(folder)
    autoencoder.task = "autoencoder"
    autoencoder.autoencoder = dict(kind="kl")
    with pytest.raises(ValueError, match="data.buckets: an autoencoder trains on squares"):
        make_task(autoencoder)
