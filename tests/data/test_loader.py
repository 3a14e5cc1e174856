"""The contract of the loader: a batch is a function of (seed, step), however it is divided."""

import threading
from itertools import islice

import numpy as np
import pytest

from ldm_jax.data.loader import Loader, batches_once
from ldm_jax.data.sources import EmojiSource

N = 10


class Numbers:
    """Ten pictures 4x4; picture i has the value 20*i everywhere."""

    classes = ("even", "odd")

    def __len__(self):
        return N

    def __getitem__(self, index):
        image = np.full((4, 4, 3), 20 * index, np.uint8)
        return {"image": image, "caption": str(index), "label": index % 2, "name": str(index)}


AUGMENT = ("flip", "color")


def loader(batch_size=4, seed=0, **kwargs):
    return Loader(Numbers(), batch_size, seed, **kwargs)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_batch_contents():
    batch = loader().batch(0)
    assert batch["image"].shape == (4, 4, 4, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32 and batch["index"].dtype == np.int64
    for i, index in enumerate(batch["index"]):
        assert (batch["image"][i] == 20 * index).all()
        assert batch["caption"][i] == str(index) and batch["label"][i] == index % 2


def test_every_epoch_is_another_permutation():
    load = loader(batch_size=4)
    order = np.concatenate([load.batch(step)["index"] for step in range(10)])
    epochs = order.reshape(4, N)  # 4 epochs: batches 2 and 7 span two of them
    for epoch in epochs:
        assert sorted(epoch) == list(range(N))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_batch_larger_than_the_source():
    counts = np.bincount(loader(batch_size=25).batch(0)["index"], minlength=N)
    assert counts.sum() == 25 and counts.min() >= 2 and counts.max() <= 3


def test_depends_on_the_seed_only():
    assert_same(loader(augment=AUGMENT).batch(3), loader(augment=AUGMENT).batch(3))
    assert (loader(seed=1).batch(3)["index"] != loader(seed=0).batch(3)["index"]).any()
    a, b = (loader(seed=s, shuffle=False, augment=AUGMENT).batch(0) for s in (0, 1))
    assert (a["index"] == b["index"]).all() and (a["image"] != b["image"]).any()


def test_order_is_frozen():
    assert loader(batch_size=10).batch(0)["index"].tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_the_global_batch(count):
    whole = loader(batch_size=8, augment=AUGMENT)
    parts = [
        loader(batch_size=8, augment=AUGMENT, process_index=p, process_count=count)
        for p in range(count)
    ]
    for step in (0, 1, 7):
        expected = whole.batch(step)
        batches = [part.batch(step) for part in parts]
        assert all(len(batch["caption"]) == 8 // count for batch in batches)
        for key in expected:
            np.testing.assert_array_equal(np.concatenate([b[key] for b in batches]), expected[key])


def test_the_same_picture_is_augmented_anew_every_epoch():
    load = loader(batch_size=N, shuffle=False, augment=("color",))
    a, b = load.batch(0), load.batch(1)
    assert (a["index"] == b["index"]).all() and (a["image"] != b["image"]).any()


def test_without_shuffle():
    load = loader(batch_size=4, shuffle=False)
    assert load.batch(2)["index"].tolist() == [8, 9, 0, 1]


@pytest.mark.parametrize("start", [0, 5])
def test_iterate_equals_batch_and_resumes(start):
    load = loader(augment=AUGMENT)
    steps = list(islice(load.iterate(start), 4))
    assert [step for step, _ in steps] == [start, start + 1, start + 2, start + 3]
    for step, batch in steps:
        assert_same(batch, load.batch(step))


def test_closing_ends_the_threads():
    iterator = loader().iterate(prefetch=3)
    next(iterator)
    assert [t for t in threading.enumerate() if t.name.startswith("loader")]
    iterator.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]


def test_errors_of_the_threads_arrive():
    class Broken(Numbers):
        def __getitem__(self, index):
            raise OSError(f"picture {index} is gone")

    with pytest.raises(OSError, match="is gone"):
        next(Loader(Broken(), 2, 0).iterate())
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]


@pytest.mark.parametrize("count", [1, 2])
def test_batches_once(count):
    parts = [list(batches_once(Numbers(), 4, p, count)) for p in range(count)]
    assert [len(part) for part in parts] == [3] * count
    joined = [
        {key: np.concatenate([part[i][key] for part in parts]) for key in ("index", "valid")}
        for i in range(3)
    ]
    index, valid = (np.concatenate([batch[key] for batch in joined]) for key in ("index", "valid"))
    assert index.tolist() == [*range(N), 9, 9] and valid.tolist() == [True] * N + [False] * 2
    assert parts[0][0]["image"].shape == (4 // count, 4, 4, 3)


def test_refusals():
    with pytest.raises(ValueError, match="batch_size 6 is not divisible by 4 processes"):
        loader(batch_size=6, process_count=4)
    with pytest.raises(ValueError, match="process_index 2 of 2"):
        loader(process_index=2, process_count=2)
    with pytest.raises(ValueError, match="unknown augment 'rotate'; choose from"):
        loader(augment=("rotate",))
    with pytest.raises(ValueError, match="the source is empty"):
        Loader([], 4, 0)


def test_emoji_with_every_augmentation():
    source = EmojiSource()
    load = Loader(source, 8, 0, ("background", "flip", "zoom", "shift", "color", "tags"))
    batch = load.batch(0)
    assert batch["image"].shape == (8, 64, 64, 3)
    assert (batch["image"] != np.stack([source[i]["image"] for i in batch["index"]])).any()
