"""ShardSource: examples, splits, smaller sizes, broken records and files, and training from it."""

import itertools
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from ldm_jax.data.filters import Options
from ldm_jax.data.folder import FolderSource
from ldm_jax.data.images import fit
from ldm_jax.data.loader import Loader
from ldm_jax.data.placement import Placement
from ldm_jax.data.preparation import prepare
from ldm_jax.data.shards import ENCODINGS, ShardSource, pack, unpack
from ldm_jax.data.sources import open_source
from tests.tiny_data_sets import encoded, save, write_tar

SIZE = 8


def made(path, **options):
    prepare(str(path / "in"), str(path / "out"), Options(**dict(image_size=SIZE) | options))
    return path / "out"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of 30 pictures of three classes, in `in`, and its shards of 7, in `out`."""
    path = tmp_path_factory.mktemp("prepared")
    for i in range(30):
        save(path / "in" / "abc"[i % 3] / f"{i:02}.png", i, (16 + i, 12))
        (path / "in" / "abc"[i % 3] / f"{i:02}.txt").write_text(f"picture {i}")
    made(path, shard_size=7)
    return path


def config(path, **fields):
    fields = dict(source="shards", path=str(path), image_size=SIZE) | fields
    return ConfigDict(fields)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_splits_are_those_of_the_folder(prepared, fraction):
    for split in ("train", "held_out", "all"):
        both = [
            open_source(config(prepared / path, source=source, held_out=fraction), split)
            for source, path in (("shards", "out"), ("folder", "in"))
        ]
        names = [[e["name"] for e in source] for source in both]
        assert names[0] == names[1] and both[0].classes == both[1].classes == ("a", "b", "c")
        count = {"train": 24, "held_out": 6, "all": 30}[split]
        if fraction in (0, 1):  # all of them would be held out: none is
            count = {"train": 30, "held_out": 0, "all": 30}[split]
        assert len(names[0]) == count


def test_examples_are_read_at_random_and_described_unread(prepared, monkeypatch):
    source = ShardSource(prepared / "out", "all", SIZE)
    example = source[17]
    known = {"caption": "picture 23", "label": 2, "name": "c/23.png"}
    assert source[-1]["name"] == "c/29.png"
    index = [source.describe(i)["name"] for i in range(30)].index("c/23.png")
    example = source[index]
    assert {key: example[key] for key in known} == known
    assert example["placement"] == Placement.centre((12, 39), (SIZE, SIZE))
    expected = FolderSource(prepared / "in", "all", SIZE)[index]["image"]
    np.testing.assert_array_equal(example["image"], expected)
    monkeypatch.setattr(ShardSource, "_read", None)
    assert source.describe(index) == known
    with pytest.raises(IndexError):
        source.describe(30)


def test_classes_are_chosen(prepared):
    subset = open_source(config(prepared / "out", classes=("b",)), "all")
    assert [e["label"] for e in subset] == [1] * 10


def test_a_smaller_size(prepared):
    whole, small = (ShardSource(prepared / "out", "all", size) for size in (SIZE, 4))
    for a, b in zip(whole, small, strict=True):
        np.testing.assert_array_equal(fit(a["image"], (4, 4)), b["image"])
        assert b["placement"] == Placement.centre(a["placement"].original, (4, 4))


def test_a_larger_size_is_refused(prepared):
    message = "data.image_size=9: .*/out was prepared with --image_size=8; prepare a new folder"
    with pytest.raises(ValueError, match=message):
        ShardSource(prepared / "out", "all", 9)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("channels", [3, 4])
def test_encodings(encoding, channels):
    ramp = np.indices((16, 16)).sum(0).astype(np.uint8) * 7
    square = np.stack([ramp, ramp.T, 255 - ramp, np.full_like(ramp, 255)][:channels], axis=-1)
    if channels == 4:
        square[:4, :4, 3] = 0
    found, entries = unpack(pack(square, (20, 30), encoding, {"name": "a"}))
    assert found.shape == square.shape and entries["name"] == "a"
    assert entries["original"] == [20, 30]
    if encoding != "jpeg" or channels == 4:
        np.testing.assert_array_equal(found, square)
    else:
        assert 0 < np.abs(found.astype(int) - square).max() <= 8


def test_the_encoding_is_that_of_the_option(tmp_path):
    save(tmp_path / "in" / "1.png", 1)
    source = ShardSource(made(tmp_path, encoding="png"), "all", SIZE)
    assert unpack(source._records[0])[1]["picture"].startswith(b"\x89PNG")


def test_transparency(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (12, 12), (200, 100, 0, 51)).save(tmp_path / "in" / "1.png")
    Image.new("RGBA", (12, 12), (200, 100, 0, 255)).save(tmp_path / "in" / "2.png")
    made(tmp_path)
    sources = [ShardSource(tmp_path / "out", "all", SIZE, background=(0, 0, 255))]
    sources.append(FolderSource(tmp_path / "in", "all", SIZE, background=(0, 0, 255)))
    for example, other in zip(*sources, strict=True):
        assert example["background"] == other["background"] == (0, 0, 255)
        np.testing.assert_array_equal(example["image"], other["image"])
        np.testing.assert_array_equal(example["rgba"], other["rgba"])


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches(prepared, workers):
    shards = open_source(config(prepared / "out"), "train")
    folder = open_source(config(prepared / "in", source="folder"), "train")
    expected = Loader(folder, 5, seed=0)
    with closing(Loader(shards, 5, seed=0, workers=workers).iterate()) as steps:
        for step, batch in itertools.islice(steps, 8):
            assert batch["caption"] == expected.batch(step)["caption"]
            np.testing.assert_array_equal(batch["image"], expected.batch(step)["image"])


def test_threads_and_copies(prepared):
    source = ShardSource(prepared / "out", "all", SIZE)
    expected = [example["image"].tobytes() for example in source]
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: copy[i % 30]["image"].tobytes(), range(300)))
    assert found == expected * 10


def break_record(shard, source, index):
    """Overwrites the middle of one record's bytes in the file of a shard."""
    record = source._records[index]
    content = bytearray(shard.read_bytes())
    at = content.index(record)
    content[at + 30 : at + 60] = bytes(30)
    shard.write_bytes(content)


@pytest.fixture
def broken(tmp_path):
    """Six pictures of two classes, of which one record is broken."""
    for i in range(6):
        save(tmp_path / "in" / "ab"[i % 2] / f"{i}.png", i)
    shard = made(tmp_path) / "shard-00000.array_record"
    break_record(shard, ShardSource(tmp_path / "out", "all", SIZE), 2)
    return tmp_path / "out"


def test_a_broken_record_is_replaced_by_the_next_of_its_class(broken, caplog):
    source = ShardSource(broken, "all", SIZE)
    assert source.describe(2)["name"] == "a/4.png" and not caplog.messages
    for _ in range(2):
        names = [example["name"] for example in source]
        assert names == ["a/0.png", "a/2.png", "a/0.png", "b/1.png", "b/3.png", "b/5.png"]
    assert source.describe(2)["name"] == "a/0.png" and source.left_out == {"damaged": 1}
    message = f"the record a/4.png in {broken} cannot be read, another picture replaces it: damaged"
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(message)


def test_a_broken_record_raises(broken):
    source = ShardSource(broken, "all", SIZE, on_error="raise")
    with pytest.raises(ValueError, match=r"the record a/4\.png in .*/out: damaged"):
        source[2]
    with pytest.raises(ValueError, match='\'ignore\'; choose "skip" or "raise"'):
        ShardSource(broken, "all", SIZE, on_error="ignore")


def test_a_truncated_or_missing_shard(prepared, tmp_path):
    save(tmp_path / "in" / "1.png", 1)
    out = made(tmp_path)
    shard, contents = out / "shard-00000.array_record", out / "shard-00000.json"
    size = shard.stat().st_size
    mend = "run the same command of ldm_jax.prepare again"
    os.truncate(shard, 1000)
    with pytest.raises(
        ValueError, match=f"00000.array_record has 1000 bytes instead of {size}: {mend}"
    ):
        ShardSource(out, "all", SIZE)
    shard.unlink()
    with pytest.raises(ValueError, match=f"shard-00000.array_record is missing: {mend}"):
        ShardSource(out, "all", SIZE)
    contents.write_text("{")
    with pytest.raises(ValueError, match=f"shard-00000.json is damaged .*: {mend}"):
        ShardSource(out, "all", SIZE)
    made(tmp_path)
    assert len(ShardSource(out, "all", SIZE)) == 1


def test_folders_without_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' is not a folder"):
        ShardSource(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no shards; make them with python -m ldm_jax.prep"):
        ShardSource(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ValueError, match="report.json is damaged"):
        ShardSource(tmp_path)
    with pytest.raises(ValueError, match="data.source='shards' needs data.path"):
        open_source(config(""))


def test_what_the_command_dropped_is_left_out(tmp_path):
    about = json.dumps({"punsafe": 0.9})
    members = {"1.png": encoded(1), "2.png": encoded(2), "2.json": about, "3.jpg": b"broken"}
    write_tar(
        tmp_path / "in" / "0.tar", members | {"4.png": encoded(4), "4.json": '{"punsafe": 0}'}
    )
    source = ShardSource(made(tmp_path, max_unsafe=0.5), "all", SIZE)
    assert [e["name"] for e in source] == ["0.tar/4.png"]
    assert source.left_out == {"no unsafe score": 2, "the unsafe score is over 0.5": 1}


def test_home_is_expanded(prepared, monkeypatch):
    monkeypatch.setenv("HOME", str(prepared))
    assert len(ShardSource("~/out", "all", SIZE)) == 30
