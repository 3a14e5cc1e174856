"""Latents and states of captions on disk: as those in memory, interrupted, and refused."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from ldm_jax.data import whole_files
from ldm_jax.data.latent_shards import CachedSource
from ldm_jax.data.loader import example_rng
from ldm_jax.data.transforms import compose
from ldm_jax.interop import diffusers
from ldm_jax.interop.opening import open_any
from ldm_jax.runtime.mesh import make_mesh
from ldm_jax.training import caching
from ldm_jax.training.caching import Options, table, write_cache
from ldm_jax.training.latents import moments
from ldm_jax.training.loop import train
from ldm_jax.training.tasks import make_task
from tests.conftest import ROOT
from tests.interop.systems import random_params, system
from tests.models.published import config_file
from tests.tiny_data_sets import write_tar
from tests.training.test_processes import free_port
from tests.training.variants import photographs

SIZE = 32  # latents of 16, for these autoencoders halve once
SMALL = Options(shard_size=8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("photographs"))


def written(path, seed=0):
    """A folder of Stable Diffusion 1, narrow and random."""
    config = system("stable-diffusion-1")
    diffusers.write(path, config | {"image_size": SIZE}, random_params(config, seed))
    return path


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    return written(tmp_path_factory.mktemp("model") / "sd1")


@pytest.fixture
def config(stable, pictures):
    return finetune(stable, pictures)


def finetune(start, pictures):
    config = config_file(ROOT / "configs" / "finetune.py").get_config()
    config.init_from = str(start)
    config.data.update(path=str(pictures), image_size=SIZE, held_out=0.2)
    config.sampling.steps = 1
    config.train.update(batch_size=8, steps=2, log_every=1, preview_every=2, checkpoint_every=2)
    return config


@pytest.fixture(scope="module")
def opened(stable, pictures):
    """The task of which a cache is made, opened once for all."""
    config = finetune(stable, pictures)
    config.update(latents="step", text_states="step")
    return make_task(config)


@pytest.fixture
def known(opened, monkeypatch):
    monkeypatch.setattr(caching, "make_task", lambda *_: opened)


@pytest.fixture(scope="module")
def cache(stable, pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "all"
    write_cache(finetune(stable, pictures), path, SMALL)
    return path


def stored(config, cache, states="step"):
    config.update(latents="shards", cache=str(cache), text_states=states)
    return config


def files(folder):
    """The content of all files but the index, which has the dates of the pictures."""
    paths = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def in_mesh(function):
    with jax.set_mesh(make_mesh({})):
        return function()


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_batches_are_those_of_memory(config, cache, pictures):
    """The same moments and states, bit for bit, without the pictures."""
    config.update(latents="memory", text_states="memory")
    kept = make_task(config)
    config.data.path = str(pictures / "gone")
    read = make_task(stored(config, cache, "shards"))
    assert [len(s) for s in (read.source, read.held_out)] == [
        len(s) for s in (kept.source, kept.held_out)
    ]
    for task in (kept, read):
        in_mesh(lambda task=task: getattr(task.source, "moments", None))
        in_mesh(lambda task=task: getattr(task.held_out, "moments", None))
    for (_, a), (_, b), _ in zip(kept.batches(0), read.batches(0), range(3), strict=False):
        a["text"], b["text"] = a["text"].context, b["text"].context
        same(a, b)
    null = [task.embedders[0].null(3) for task in (kept, read)]
    same(*null)


@pytest.mark.long
def test_training_is_that_of_memory(config, cache, tmp_path):
    config.update(latents="memory", text_states="memory")
    train(config, tmp_path / "memory")
    train(stored(config, cache, "shards"), tmp_path / "shards")
    same(*(open_any(tmp_path / how).params for how in ("memory", "shards")))
    assert (tmp_path / "shards" / "first_batch.png").exists()


def test_a_mirror_image_is_drawn_as_that_of_a_picture(config, cache):
    """The moments of the mirrored pixels, for the examples that `flip` would mirror."""
    task = make_task(stored(config, cache))
    source, pictures, flip = task.source, task.source.pictures, compose(("flip",))
    mirrored = 0
    for i in range(len(source)):
        example = flip(source[i], example_rng(0, i))
        picture = flip(pictures[i], example_rng(0, i))
        assert example["placement"] == picture["placement"]
        mirrored += picture["placement"].mirrored
        params = task.frozen["autoencoder"]
        expected = moments(task.model.autoencoder, params, picture["image"][None])[0]
        np.testing.assert_allclose(np.asarray(example["moments"]), expected, rtol=1e-4, atol=1e-4)
    assert 0 < mirrored < len(source)


def test_a_condition_of_pixels_reads_the_pictures(config, cache, pictures):
    config.data.conditions = dict(edges={})
    config.data.augment = ("flip",)
    task = make_task(stored(config, cache))
    made = task.conditions[0](example := task.source[0], None)
    assert made["edges"].shape == (SIZE, SIZE, 1) and np.asarray(example["moments"]).ndim == 3
    config.data.conditions = dict(hint={})
    with pytest.raises(FileNotFoundError, match="hint: 19 of 19 pictures have no file .hint.png"):
        make_task(config)
    config.data.conditions = dict(edges={})
    config.data.path = str(pictures / "rose")
    with pytest.raises(ValueError, match="in train, and data.source gives .* now: these are other"):
        make_task(config)
    names = [known["name"] for known in map(task.source.describe, range(len(task.source)))]
    task.source._names = names[:3] + ["another"] + names[4:]
    with pytest.raises(ValueError, match="all has 'another' where data.source gives 'rose/.*jpg'"):
        task.source[3]


def test_sizes_need_no_pictures(config, cache, pictures):
    config.data.conditions = dict(sizes={})
    expected = make_task(config.copy_and_resolve_references())
    config.data.path = str(pictures / "gone")
    task = make_task(stored(config, cache))
    condition = task.conditions[0]
    same(condition(task.source[3], None), condition(expected.source[3], None))


def test_the_order_and_number_of_processes_change_nothing(
    config, cache, known, tmp_path, monkeypatch
):
    """Two processes, one after the other, each with its shards; the report comes at the end."""
    monkeypatch.setattr(caching, "_report", lambda *_: {})
    for own in (1, 0):
        monkeypatch.setattr(caching, "is_first", lambda: True)
        monkeypatch.setattr(caching, "_share", lambda own=own: (own, 2))
        write_cache(config, tmp_path / "two", SMALL)
    expected = files(cache)
    del expected["report.json"]
    assert files(tmp_path / "two") == expected


@pytest.mark.parametrize("moment", [0, 2, 5, 9])
def test_interrupted_at_any_file(config, cache, known, tmp_path, monkeypatch, moment):
    """Before a file gets its name: options, two of each shard, the report."""
    replace, calls = os.replace, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == moment + 1:
            raise KeyboardInterrupt
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_cache(config, tmp_path / "out", SMALL)
    write_cache(config, tmp_path / "out", SMALL)
    assert files(tmp_path / "out") == files(cache)


def test_worker_processes_read_the_same(config, cache):
    config.data.augment = ("flip",)
    batches = []
    for workers in (0, 1):
        config.data.workers = workers
        with contextlib.closing(make_task(stored(config, cache, "shards")).batches(0)) as read:
            _, batch = next(read)
        batches.append(batch | {"text": batch["text"].context})
    same(*batches)


@pytest.mark.long
def test_two_processes_by_the_command(cache, stable, pictures, tmp_path):
    """Each writes its shards, and the first the report: the files are those of one process."""
    port = free_port()
    command = [
        sys.executable, "-m", "ldm_jax.cache", f"--config={ROOT}/configs/finetune.py",
        f"--config.init_from={stable}", f"--config.data.path={pictures}", "--shard_size=8",
        "--config.data.held_out=0.2", f"--config.data.image_size={SIZE}", f"--out={tmp_path}/out",
        f"--coordinator=localhost:{port}", "--processes=2",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    processes = [subprocess.Popen([*command, f"--process={i}"], env=environment) for i in (0, 1)]
    assert [process.wait() for process in processes] == [0, 0]
    assert files(tmp_path / "out") == files(cache)


DYING = """
import itertools, os, signal, sys
sys.path.insert(0, {root!r})
import tests.conftest  # first, as pytest does, for its flags
from tests.training.test_cache import SMALL, finetune
from ldm_jax.training import caching
events = itertools.count()
def dying(function):
    def called(*args):
        if next(events) == {moment}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return called
caching.Shard.add, os.replace = dying(caching.Shard.add), dying(os.replace)
caching.write_cache(finetune({start!r}, {pictures!r}), {out!r}, SMALL)
"""


@pytest.mark.long
@pytest.mark.parametrize("moment, shards", [(3, 0), (6, 1), (7, 1), (8, 2)])
def test_killed_and_continued(config, cache, known, stable, pictures, tmp_path, moment, shards):
    """While a shard is written, before its contents and before its records get their names."""
    script, out = tmp_path / "dying.py", tmp_path / "out"
    parts = dict(root=str(ROOT), start=str(stable), pictures=str(pictures), out=str(out))
    script.write_text(DYING.format(**parts, moment=moment))
    assert subprocess.run([sys.executable, script], cwd=ROOT).returncode == -signal.SIGKILL
    there = {p: p.stat().st_ino for p in out.rglob("*.array_record")}
    assert len(there) == shards
    with pytest.raises(ValueError, match="out is not finished: run the same command of ldm_jax.c"):
        make_task(stored(config.copy_and_resolve_references(), out))
    write_cache(config, out, SMALL)
    assert {p: p.stat().st_ino for p in there} == there
    assert files(out) == files(cache)


def changed(config, cache, how):
    """A config and a copy of a cache, of which something is wrong."""
    out = cache.with_name("bad")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(cache, out)
    how(config, out)
    return stored(config, out, config.text_states)


def rewrite(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


SHARD = "train/shard-00001.array_record"
BAD = {
    "no cache": (lambda c, out: shutil.rmtree(out), "bad is no cache of latents: .* No such file"),
    "no path": (lambda c, out: c.update(cache=""), "latents='shards' needs cache=PATH: a folder"),
    "other shards": (
        lambda c, out: rewrite(out / "options.json", format="ldm_jax shards 1"),
        "bad is no cache of latents, but holds ldm_jax shards 1"),
    "unfinished": (
        lambda c, out: (out / "report.json").unlink(),
        "bad is not finished: run the same command of ldm_jax.cache again"),
    "a truncated shard": (
        lambda c, out: os.truncate(out / SHARD, 100),
        "shard-00001.array_record has 100 bytes instead of .*: run the same command of ldm_jax.ca"),
    "a missing shard": (
        lambda c, out: (out / SHARD).unlink(),
        "shard-00001.array_record is missing: run the same command of ldm_jax.cache again"),
    "another autoencoder": (
        lambda c, out: rewrite(out / "options.json", autoencoder="0"),
        "bad has latents of another autoencoder than this model's: name the one that it was"),
    "another text encoder": (
        lambda c, out: (
            rewrite(out / "options.json", texts={"text": "0"}), c.update(text_states="shards")),
        "bad has states of another text encoder than conditioning.text, or not"),
    "another precision": (
        lambda c, out: c.update(text_states="shards", precision="bfloat16"),
        "not of precision='bfloat16': make another cache"),
    "no states": (
        lambda c, out: (
            rewrite(out / "options.json", states={}, texts={}), c.update(text_states="shards")),
        "bad has no states of captions; use 'step' or 'memory', or store them"),
    "states alone": (
        lambda c, out: c.update(latents="memory", text_states="shards"),
        "text_states='shards' needs latents='shards'"),
    "another size": (
        lambda c, out: c.data.update(image_size=64),
        "bad was made with data.image_size=32, and the config has 64: give the same, or make"),
    "another split": (
        lambda c, out: c.data.update(held_out=0.5),
        "bad was made with data.held_out=0.2, and the config has 0.5"),
    "moving pictures": (
        lambda c, out: c.data.update(augment=("flip", "zoom")),
        "data.augment: zoom needs more than latents='shards' has of a picture, which allows flip"),
    "changing captions": (
        lambda c, out: (
            c.data.update(augment=("drop_tags:0.5",)), c.update(text_states="shards")),
        "drop_tags:0.5 changes captions, whose states are stored; use text_states='step'"),
    "no mirror images": (
        lambda c, out: (
            rewrite(out / "options.json", flips=False), c.data.update(augment=("flip",))),
        "bad was made with --noflips, so it has no mirror images"),
    "buckets": (
        lambda c, out: c.data.update(buckets=True),
        "data.buckets: latents='shards' keeps latents of one shape; use latents='step'"),
    "prior": (
        lambda c, out: c.update(prior=dict(prompt="a dog", count=2)),
        "prior.prompt draws few pictures: use latents='memory'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_read_is_refused_in_a_sentence(what, config, cache):
    how, message = BAD[what]
    with config.unlocked():
        config = changed(config, cache, how)
    if what == "no path":
        config.cache = ""
    if what == "states alone":
        config.latents = "memory"
    with pytest.raises(ValueError, match=message):
        make_task(config)


def test_a_record_that_is_not_whole(config, cache):
    task = make_task(changed(config, cache, lambda c, out: None))
    path = cache.with_name("bad") / "train" / "shard-00000.array_record"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(ValueError, match="bad/train: record 0 cannot be read"):
        np.asarray(task.source[0]["moments"])


def test_what_cannot_be_written_is_refused_in_a_sentence(
    config, known, opened, tmp_path, monkeypatch
):
    write_cache(config, tmp_path / "out", SMALL)
    with pytest.raises(ValueError, match="begun with --shard_size=8, now it is 4: give the same"):
        write_cache(config, tmp_path / "out", dataclasses.replace(SMALL, shard_size=4))
    with pytest.raises(ValueError, match="out was begun with other text encoders; choose a new"):
        write_cache(config, tmp_path / "out", dataclasses.replace(SMALL, states=False))
    with pytest.raises(ValueError, match="--dtype=int8: choose one of float32, float16, bfloat16"):
        write_cache(config, tmp_path / "new", Options(dtype="int8"))
    with whole_files.locked(tmp_path / "out"), pytest.raises(ValueError, match="another process"):
        write_cache(config, tmp_path / "out", SMALL)
    large = jax.tree.map(lambda leaf: 1e6 * leaf, opened.frozen["autoencoder"])
    other = dataclasses.replace(opened, frozen=opened.frozen | {"autoencoder": large})
    monkeypatch.setattr(caching, "make_task", lambda *_: other)
    with pytest.raises(ValueError, match="out was begun with another autoencoder; choose a new"):
        write_cache(config, tmp_path / "out", SMALL)
    with pytest.raises(ValueError, match="moments of .*jpg: .* is beyond float16; use --dtype=f"):
        write_cache(config, tmp_path / "new", dataclasses.replace(SMALL, dtype="float16"))
    config.task = "autoencoder"
    with pytest.raises(ValueError, match="task='autoencoder' has no latents to store"):
        write_cache(config, tmp_path / "third")


@pytest.mark.parametrize("dtype, error", [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_of_the_bytes(config, cache, known, tmp_path, dtype, error):
    """The error of rounding to the bits that are left, at most, and what is reported."""
    report = write_cache(config, tmp_path / "out", dataclasses.replace(SMALL, dtype=dtype))
    exact, half = (CachedSource(path, "train", lambda: None) for path in (cache, tmp_path / "out"))
    for entry in ("moments", "text/context"):
        a, b = (np.asarray(source[5][entry], np.float64) for source in (exact, half))
        assert 0 < np.max(np.abs(a - b) / (np.abs(a) + 1e-4)) <= error
        assert half[5][entry].__array__().dtype == np.float32
    expected = 0.3 * error
    assert expected < report["relative_error"]["moments"] < error
    assert report["relative_error"].keys() == {"moments", "states"}
    assert "19 examples in 3 shards" in table(report)


@pytest.fixture
def tars(cache, tmp_path):
    """What the cache has, as MLPerf's tars."""
    source, folder = CachedSource(cache, "train", lambda: None), tmp_path / "tars"
    for number in (0, 1):
        members = {}
        for i in range(number, len(source), 2):
            file = io.BytesIO()
            np.save(file, np.asarray(source[i]["moments"]).transpose(2, 0, 1))
            members |= {f"{i:05}.npy": file.getvalue(), f"{i:05}.txt": source[i]["caption"]}
        write_tar(folder / f"{number:05}.tar", members)
    return folder


def test_tars_of_moments(config, cache, tars, tmp_path):
    """They are read as they are, and `ldm_jax.cache` makes shards with states of them."""
    expected = make_task(stored(config.copy_and_resolve_references(), cache, "shards"))
    config.data.held_out = 0.0
    task = make_task(stored(config, tars, "memory"), tmp_path / "pictures.json")
    assert (tmp_path / "moments.npz").exists() and not len(task.held_out)
    with pytest.raises(ValueError, match="has no moments of mirror images: give --noflips"):
        write_cache(config, tmp_path / "out", SMALL)
    write_cache(config, tmp_path / "out", dataclasses.replace(SMALL, flips=False))
    of_tars = make_task(stored(config.copy_and_resolve_references(), tmp_path / "out", "shards"))
    rows = [i for number in (0, 1) for i in range(number, len(expected.source), 2)]
    for place, i in enumerate(rows):
        a, b, c = expected.source[i], task.source[place], of_tars.source[place]
        assert a["caption"] == b["caption"] == c["caption"]
        for other in (b, c):
            np.testing.assert_array_equal(a["moments"], other["moments"])
        np.testing.assert_array_equal(a["text/context"], c["text/context"])
    _, batch = next(task.batches(0))
    assert batch["moments"].shape == (8, 16, 16, 8) and batch["text"].context.shape == (8, 77, 64)
    assert task.first_batch_picture(0).shape[2] == 3

    config.data.conditions = dict(edges={})
    with pytest.raises(
        ValueError, match="data.conditions.edges is made of a picture, and .*tars ha"
    ):
        make_task(config)
    config.data.conditions = {}
    config.data.augment = ("flip",)
    with pytest.raises(ValueError, match="data.augment: .*tars has no moments of mirror images"):
        make_task(config)
    config.data.augment = ()
    config.evaluators.distance.every = 5
    with pytest.raises(ValueError, match="evaluators.distance compares with pictures, and .*tars"):
        make_task(config)
    config.evaluators.distance.every, config.text_states = 0, "shards"
    with pytest.raises(
        ValueError, match="tars has no states of captions; use 'step' or 'memory', o"
    ):
        make_task(config)
    config.data.image_size, config.text_states = 64, "step"
    with pytest.raises(ValueError, match=r"npy has the shape \(8, 16, 16\), .* are \(8, 32, 32\)"):
        make_task(config)
