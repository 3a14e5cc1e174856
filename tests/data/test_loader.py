"""The contract of the loader: a batch is a function of (seed, step), however it is divided."""

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import UnidentifiedImageError

from ldm_jax.data import loader as module
from ldm_jax.data.loader import Loader, batches_once, example_rng
from ldm_jax.data.sources import EmojiSource
from ldm_jax.data.transforms import compose

N = 10


class Numbers:
    """Ten pictures 4x4; picture i has the value 20*i everywhere."""

    classes = ("even", "odd")

    def __len__(self):
        return N

    def __getitem__(self, index):
        image = np.full((4, 4, 3), 20 * index, np.uint8)
        return {"image": image, "caption": str(index), "label": index % 2, "name": str(index)}


AUGMENT = compose(("flip", "color"))


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
    assert_same(loader(transform=AUGMENT).batch(3), loader(transform=AUGMENT).batch(3))
    assert (loader(seed=1).batch(3)["index"] != loader(seed=0).batch(3)["index"]).any()
    a, b = (loader(seed=s, shuffle=False, transform=AUGMENT).batch(0) for s in (0, 1))
    assert (a["index"] == b["index"]).all() and (a["image"] != b["image"]).any()


def test_draws_are_frozen():
    assert example_rng(0, 7).integers(0, 1000, 4).tolist() == [703, 469, 578, 511]


def test_order_is_frozen():
    assert loader(batch_size=10).batch(0)["index"].tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_the_global_batch(count):
    whole = loader(batch_size=8, transform=AUGMENT)
    parts = [
        loader(batch_size=8, transform=AUGMENT, process_index=p, process_count=count)
        for p in range(count)
    ]
    for step in (0, 1, 7):
        expected = whole.batch(step)
        batches = [part.batch(step) for part in parts]
        assert all(len(batch["caption"]) == 8 // count for batch in batches)
        for key in expected:
            np.testing.assert_array_equal(np.concatenate([b[key] for b in batches]), expected[key])


def test_the_same_picture_is_augmented_anew_every_epoch():
    load = loader(batch_size=N, shuffle=False, transform=compose(("color",)))
    a, b = load.batch(0), load.batch(1)
    assert (a["index"] == b["index"]).all() and (a["image"] != b["image"]).any()


def test_without_shuffle():
    load = loader(batch_size=4, shuffle=False)
    assert load.batch(2)["index"].tolist() == [8, 9, 0, 1]


@pytest.mark.parametrize("start", [0, 5])
def test_iterate_equals_batch_and_resumes(start):
    load = loader(transform=AUGMENT)
    steps = list(islice(load.iterate(start), 4))
    assert [step for step, _ in steps] == [start, start + 1, start + 2, start + 3]
    for step, batch in steps:
        assert_same(batch, load.batch(step))


def shifting(table):
    """A transform that is closed over an array of its own."""

    def apply(example, rng):
        shift = int(rng.choice(table))
        return example | {"shift": shift, "row": np.roll(table, shift)}

    return apply


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_batches_and_end(workers):
    load = loader(
        batch_size=8,
        transform=shifting(np.arange(5, dtype=np.uint8)),
        entries=("image", "label", "caption", "shift", "row"),
        process_index=1,
        process_count=2,
        workers=workers,
    )
    batches = load.iterate(start_step=3)
    for expected, (step, batch) in zip(range(3, 8), batches, strict=False):
        assert step == expected
        assert_same(batch, load.batch(step))
        assert type(batch["image"]) is np.ndarray and batch["image"].flags.writeable
    assert len(multiprocessing.active_children()) == workers
    batches.close()
    assert_all_end()


def prefetching():
    """The threads that make or fetch batches."""
    return [t for t in threading.enumerate() if t.name.startswith("grain-")]


def assert_all_end():
    deadline = time.monotonic() + 10
    while (prefetching() or multiprocessing.active_children()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not prefetching() and not multiprocessing.active_children()


def test_closing_ends_the_threads():
    iterator = loader().iterate(prefetch=3)
    next(iterator)
    assert prefetching()
    iterator.close()
    assert_all_end()


class Fails(Numbers):
    """Without shuffling and with 4 a batch: fails at step 1, in the given way."""

    def __init__(self, fail):
        self._fail = fail

    def __getitem__(self, index):
        if index == 6:
            self._fail()
        return super().__getitem__(index)


class TwoFieldsError(ValueError):
    """Does not pickle: its class wants two arguments and keeps one."""

    def __init__(self, name, fault):
        super().__init__(f"{name}: {fault}")


class PrefixError(ValueError):
    """Pickles, but says its prefix once more each time."""

    def __init__(self, text):
        super().__init__(f"bad: {text}")


def raise_two_fields():
    raise TwoFieldsError("six.jpg", "gone")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_arrives_at_its_step(workers):
    batches = Loader(Fails(raise_two_fields), 4, 0, shuffle=False, workers=workers).iterate()
    assert next(batches)[0] == 0
    with pytest.raises(ValueError) as caught:
        next(batches)
    assert str(caught.value) == "six.jpg: gone"
    assert_all_end()
    assert workers == 0 or "raise_two_fields" in caught.value.__notes__[0]  # its traceback


def test_a_killed_worker_is_an_error():
    batches = Loader(Fails(lambda: os._exit(7)), 4, 0, shuffle=False, workers=1).iterate()
    with pytest.raises(ChildProcessError, match="killed.*fewer than data.workers=1"):
        list(islice(batches, 3))
    assert_all_end()


def undecodable():
    return UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")


@pytest.mark.parametrize(
    ("error", "arrives_as"),
    [
        (ValueError("a.jpg: bad"), ValueError),
        (FileNotFoundError(2, "No such file", "a.jpg"), FileNotFoundError),
        (KeyError("mask"), KeyError),
        (UnidentifiedImageError("a.jpg"), UnidentifiedImageError),
        (undecodable(), UnicodeDecodeError),
        (TwoFieldsError("a.jpg", "gone"), ValueError),
        (PrefixError("a.jpg"), ValueError),
        (type("Local", (OSError,), {})("a.jpg"), OSError),
        (type("Local", (LookupError,), {})("a.jpg"), RuntimeError),
        (type("Local", (Exception,), {"lock": threading.Lock()})("a.jpg"), RuntimeError),
    ],
)
def test_errors_pass_between_processes(error, arrives_as):
    restored = module._restored(pickle.loads(pickle.dumps(module._packed(error))))
    assert type(restored) is arrives_as and str(restored) == str(error)


def test_full_shared_memory_is_an_error_that_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_prepare_worker", lambda: None)
    monkeypatch.setattr(module, "SHARED_MEMORY", str(tmp_path))
    result = module._Result(loader().batch(0))
    for free, fits in ((10**6, True), (1000, False)):
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _, f=free: SimpleNamespace(free=f))
        sent = pickle.loads(module._as_bytes(result, workers=4))
        assert (sent.error is None) == fits
    with pytest.raises(OSError, match="0 MB left, too little for 4 workers .*--shm-size"):
        raise module._restored(sent.error)


SCRIPT = """
import multiprocessing, signal, sys
import numpy as np
from ldm_jax.data.loader import Loader

class Numbers:
    classes = ("",)

    def __len__(self):
        return 10

    def __getitem__(self, index):
        image = np.zeros((64, 64, 3), np.uint8)
        return {"image": image, "caption": 9000 * "c", "label": 0, "name": str(index)}

if __name__ == "__main__":
    batches = Loader(Numbers(), 8, 0, workers=2).iterate()
    next(batches), next(batches)
    stop = []
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # as training does
    print([worker.pid for worker in multiprocessing.active_children()], flush=True)
    while sys.argv[1] != "leave" and not stop:
        next(batches)
    for _ in range(40):  # more than were waiting
        next(batches)
    print("ended", flush=True)
"""


def running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("how", ["ctrl-c", "leave", "kill"])
def test_all_processes_end(tmp_path, how):
    """After Ctrl-C, which a terminal sends to all, at exit, and when the parent is killed."""
    (tmp_path / "script.py").write_text(SCRIPT)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", how],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    try:
        workers = json.loads(parent.stdout.readline())
        assert len(workers) == 2
        assert how == "leave" or all(map(running, workers))  # which may have left already
        if how == "kill":
            parent.kill()
            parent.wait()
        else:
            if how == "ctrl-c":
                os.killpg(parent.pid, signal.SIGINT)
            assert parent.wait(timeout=60) == 0
            assert parent.stdout.read() == "ended\n"  # and no complaint
        deadline = time.monotonic() + 10
        while any(map(running, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(running, workers))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


def test_ctrl_c_while_threads_read():
    class Slow(Numbers):
        def __getitem__(self, index):
            time.sleep(0.3)
            return super().__getitem__(index)

    # Where the tests run in the background, SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    batches = Loader(Slow(), 2, 0).iterate()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            next(batches)
    finally:
        signal.signal(signal.SIGINT, before)
    assert_all_end()


@pytest.mark.parametrize("count", [1, 2])
def test_batches_once(count):
    parts = [
        list(batches_once(Numbers(), 4, process_index=p, process_count=count)) for p in range(count)
    ]
    assert [len(part) for part in parts] == [3] * count
    joined = [
        {key: np.concatenate([part[i][key] for part in parts]) for key in ("index", "valid")}
        for i in range(3)
    ]
    index, valid = (np.concatenate([batch[key] for batch in joined]) for key in ("index", "valid"))
    assert index.tolist() == [*range(N), 9, 9] and valid.tolist() == [True] * N + [False] * 2
    assert parts[0][0]["image"].shape == (4 // count, 4, 4, 3)


def test_batches_once_transforms_by_index():
    def drawn(example, rng):
        return example | {"drawn": rng.random()}

    a, b = (
        np.concatenate([x["drawn"] for x in batches_once(Numbers(), size, drawn, ("drawn",), 5)])
        for size in (4, 10)
    )
    expected = [np.float32(example_rng(5, i).random()) for i in range(N)]
    assert a.dtype == np.float32 and b.tolist() == expected and a.tolist() == [*b, b[-1], b[-1]]


def test_batches_once_of_nothing():
    assert list(batches_once([], 4)) == []


def collated(*values):
    """What a batch of examples with these entries holds."""

    def give(example, rng):
        return example | {"entry": values[int(example["name"])]}

    load = loader(len(values), transform=give, entries=("entry",), shuffle=False)
    return load.batch(0)["entry"]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ((1, 2), np.int32),
        ((np.int64(1), np.int16(2)), np.int32),
        ((np.uint8(1), np.uint8(2)), np.int32),
        ((1.5, 2), np.float32),
        ((np.float16(1), np.float16(2)), np.float32),
        ((True, False), bool),
        (((1, 2), (3, 4)), np.int32),
        (([[1.0]], [[2.0]]), np.float32),
        ((np.ones(3, np.float64), np.ones(3)), np.float32),
        ((np.ones(3, np.int64), np.ones(3, np.int64)), np.int32),
        ((np.ones(3, np.uint8), np.ones(3, np.uint8)), np.uint8),
        ((np.ones((2, 2), np.float16), np.ones((2, 2), np.float16)), np.float16),
        ((np.ones(3, bool), np.ones(3, bool)), bool),
    ],
)
def test_numbers_are_stacked(values, dtype):
    batch = collated(*values)
    assert batch.dtype == dtype and type(batch) is np.ndarray
    np.testing.assert_array_equal(batch, np.array(values, dtype))


def test_text_is_a_list():
    assert collated("a", "", "ü") == ["a", "", "ü"]


def test_a_batch_holds_its_entries_only():
    assert loader(entries=("caption",)).batch(0).keys() == {"caption", "index"}
    assert loader(entries=()).batch(0).keys() == {"index"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (([1, 2], [1]), r"'entry' has the shape \(2,\) in '0' and \(1,\) in '1'"),
        ((1, [1]), r"'entry' has the shape \(\) in '0' and \(1,\) in '1'"),
        ((np.zeros((0, 4)), np.zeros((2, 4))), r"\(0, 4\) in '0' and \(2, 4\) in '1'"),
        (([[1], [1, 2]], 1), "'entry' of '0' is of type list"),
        (("a", 1), "'entry' of '0' is of type str"),
        ((1, None), "'entry' of '1' is of type NoneType"),
        ((1, {}), "'entry' of '1' is of type dict"),
        ((("a", "b"), ("c",)), "'entry' of '0' is of type tuple"),
        ((b"a", b"b"), "'entry' of '0' is of type bytes"),
        ((1, 2**31), "'entry' has the number 2147483648, which int32"),
        ((1, -(2**40)), "'entry' has the number -1099511627776, which int32"),
    ],
)
def test_what_cannot_be_stacked_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        collated(*values)


def test_a_missing_entry_is_named():
    with pytest.raises(ValueError, match="example '0' has no entry 'mask'; it has caption, image,"):
        loader(entries=("image", "mask"), shuffle=False).batch(0)
    with pytest.raises(ValueError, match="example '0' has no entry 'mask'"):
        next(batches_once(Numbers(), 4, entries=("mask",)))


def test_refusals():
    with pytest.raises(ValueError, match="batch_size 6 is not divisible by 4 processes"):
        loader(batch_size=6, process_count=4)
    with pytest.raises(ValueError, match="process_index 2 of 2"):
        loader(process_index=2, process_count=2)
    with pytest.raises(ValueError, match="workers is -1"):
        loader(workers=-1)
    with pytest.raises(ValueError, match="the source is empty"):
        Loader([], 4, 0)


def test_emoji_with_every_augmentation():
    source = EmojiSource()
    every = compose(("background", "flip", "zoom", "shift", "color", "tags"))
    load = Loader(source, 8, 0, every)
    batch = load.batch(0)
    assert batch["image"].shape == (8, 64, 64, 3)
    assert (batch["image"] != np.stack([source[i]["image"] for i in batch["index"]])).any()
