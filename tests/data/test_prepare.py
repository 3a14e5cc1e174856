"""ldm_jax.prepare: every form of data set, filters, duplicates, interruptions, and bad input."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import preparation, whole_files
from ldm_jax.data.filters import Options
from ldm_jax.data.folder import FolderSource
from ldm_jax.data.preparation import prepare
from ldm_jax.data.shards import ShardSource, unpack
from ldm_jax.prepare import table
from tests.tiny_data_sets import encoded, save, write_parquet, write_tar

SIZE = 8


def run(tmp_path, out="out", workers=0, **options):
    options = Options(**dict(image_size=SIZE, shard_size=4) | options)
    return prepare(str(tmp_path / "in"), str(tmp_path / out), options, workers)


def read(tmp_path, split="all", **kwargs):
    return ShardSource(tmp_path / "out", split, **dict(image_size=SIZE) | kwargs)


def files(folder):
    """The content of all files but the index, which has the dates of the pictures."""
    paths = [path for path in folder.iterdir() if not path.name.startswith(".index.json")]
    return {path.name: path.read_bytes() for path in paths}


def dropped(report):
    return {reason: tuple(found.values()) for reason, found in report["dropped"].items()}


@pytest.fixture
def many(tmp_path):
    """A folder of 23 pictures: two have the pixels of an earlier one, and one is broken."""
    for i in range(20):
        save(tmp_path / "in" / "ab"[i % 2] / f"{i:02}.png", i)
    save(tmp_path / "in" / "b" / "98.png", 2)
    save(tmp_path / "in" / "b" / "99.png", 19)
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    return tmp_path


def test_a_folder_gives_the_examples_of_the_folder(many):
    (many / "in" / "a" / "02.txt").write_text("the second")
    save(many / "in" / "wide.jpg", 50, (90, 41))
    Image.new("RGBA", (12, 12), (9, 8, 7, 100)).save(many / "in" / "clear.png")
    Image.new("RGBA", (12, 12), (9, 8, 6, 255)).save(many / "in" / "opaque.png")
    (many / "in" / "metadata.jsonl").write_text('{"file_name": "absent.png", "text": "lost"}\n')
    report = run(many)
    folder = FolderSource(many / "in", "all", image_size=SIZE)
    expected = [e for e in folder if e["name"] not in ("b/98.png", "b/99.png")]
    source = read(many)
    assert len(source) == report["kept"] == len(expected) == 23 and report["read"] == 26
    assert source.classes == folder.classes == ("", "a", "b")
    assert source.lost_captions == folder.lost_captions == {"no such picture": 1}
    for example, other in zip(source, expected, strict=True):
        assert example.keys() == other.keys() - {"path"}
        for entry in example:
            np.testing.assert_array_equal(example[entry], other[entry])
    assert source.left_out == folder.left_out | {"the same pixels as an earlier picture": 2}


def test_the_bytes_do_not_depend_on_the_number_of_workers(many):
    reports = [run(many, f"out{workers}", workers) for workers in (0, 1, 3)]
    assert reports[0] == reports[1] == reports[2]
    assert dropped(reports[0])[preparation.DUPLICATE] == (2, ["b/98.png", "b/99.png"])
    expected = files(many / "out0")
    assert sum(name.endswith(".array_record") for name in expected) == 5
    assert files(many / "out1") == files(many / "out3") == expected


def test_fewer_pictures_than_workers(tmp_path):
    save(tmp_path / "in" / "1.png", 0)
    assert run(tmp_path, workers=3)["kept"] == 1


SLOW = """
import sys, time
from ldm_jax.data import preparation, whole_files
from ldm_jax.data.filters import Options
items = preparation._items
def slow(*args):
    for item in items(*args):
        time.sleep(0.05)
        yield item
preparation._items = slow
if __name__ == "__main__":
    options = Options(image_size=8, shard_size=4)
    preparation.prepare(sys.argv[1], sys.argv[2], options, workers=2)
"""


def test_killed_and_continued(many, root):
    run(many, "expected")
    script = many / "slow.py"
    script.write_text(SLOW)
    command = [sys.executable, script, many / "in", many / "out"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(root)})
    finished = many / "out" / "shard-00000.array_record"
    deadline = time.monotonic() + 60
    while not finished.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    there = {p: p.stat().st_ino for p in (many / "out").glob("*.array_record")}
    assert 1 <= len(there) < 5 and not (many / "out" / "report.json").exists()
    with pytest.raises(ValueError, match="out is not finished: run the same command of ldm_jax"):
        read(many)
    run(many)
    assert {p: p.stat().st_ino for p in there} == there
    assert files(many / "out") == files(many / "expected")


@pytest.mark.parametrize("moment", range(13))
def test_interrupted_at_any_file(many, monkeypatch, moment):
    """Before each file gets its name: the index, options, two of each shard, the report."""
    run(many, "expected")
    replace, calls = os.replace, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == moment + 1:
            raise KeyboardInterrupt
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        (many / "in" / ".skip").touch()
        with pytest.raises(KeyboardInterrupt):
            run(many)
    run(many)
    assert files(many / "out") == files(many / "expected")


def test_a_lost_shard_is_made_again_and_no_other(many):
    run(many)
    out, expected = many / "out", files(many / "out")
    os.truncate(out / "shard-00001.array_record", 100)
    (out / "shard-00003.json").unlink()
    others = {p: p.stat().st_ino for n in (0, 2, 4) for p in out.glob(f"shard-0000{n}.*")}
    run(many)
    assert files(out) == expected
    assert {p: p.stat().st_ino for p in others} == others


def test_other_options_are_refused(many):
    run(many)
    with pytest.raises(ValueError, match="begun with --image_size=8, now it is 4: give the same"):
        run(many, image_size=4)
    with pytest.raises(ValueError, match="begun with --max_unsafe=None, now it is 0.5"):
        run(many, max_unsafe=0.5)
    (many / "in" / "a" / "00.txt").write_text("a caption")
    with pytest.raises(
        ValueError, match="begun with other data: the files or captions in --source"
    ):
        run(many)


def test_other_files_in_out_are_refused(many):
    (many / "out").mkdir()
    (many / "out" / "thesis.doc").touch()
    with pytest.raises(
        ValueError, match=r"out holds other files, such as thesis\.doc: choose a new"
    ):
        run(many)
    assert os.listdir(many / "out") == ["thesis.doc"]


def test_two_commands_at_once(many):
    with whole_files.locked(many / "out"), pytest.raises(ValueError, match="another process"):
        run(many)


def test_tars(tmp_path):
    about = {"caption": "of the json", "pwatermark": 0.5, "AESTHETIC_SCORE": 6, "punsafe": None}
    about |= {"original_width": 160, "original_height": 120, "width": 16, "height": 12}
    write_tar(
        tmp_path / "in" / "00000.tar",
        {
            "000.jpg": encoded(0, format="JPEG"),
            "000.txt": " a caption\n",
            "000.json": json.dumps(about),
            "001.webp": encoded(1, format="WEBP"),
            "001.json": json.dumps(about | {"original_width": 120}),
            "sub/002.png": encoded(2),
            "sub/002.cls": "dog",
            "sub/002.seg.png": encoded(9),
            "003.txt": "no picture",
            "004.png": encoded(4),
            "004.json": "{",
            "005.png": encoded(5),
            "005.txt": b"\xff\xfe\xfa",
            "006.jpg": b"broken",
        },
    )
    write_tar(tmp_path / "in" / "deep" / "00001.TAR", {"000.PNG": encoded(6)})
    (tmp_path / "in" / "00000.parquet").touch()  # img2dataset's table
    report = run(tmp_path, shard_size=2)
    assert (report["read"], report["kept"], report["shards"]) == (8, 5, 3)
    assert dropped(report) == {
        "no picture": (1, ["00000.tar/003"]),
        "JSON that cannot be read": (1, ["00000.tar/004"]),
        "not a picture that Pillow can read": (1, ["00000.tar/006.jpg"]),
    }
    source = read(tmp_path)
    assert source.lost_captions == {"text that cannot be read": 1}
    found = [(e["name"], e["caption"], source.classes[e["label"]]) for e in source]
    assert found == [
        ("00000.tar/000.jpg", "a caption", ""),
        ("00000.tar/001.webp", "of the json", ""),
        ("00000.tar/sub/002.png", "dog", "dog"),
        ("00000.tar/005.png", "", ""),
        ("deep/00001.TAR/000.png", "", ""),
    ]
    # The size before img2dataset, unless its aspect ratio is another.
    assert [e["placement"].original for e in source][:2] == [(120, 160), (12, 16)]
    scores = unpack(source._records[0])[1]["scores"]
    assert scores == {"watermark": 0.5, "aesthetic": 6.0}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_tar(tmp_path, workers):
    write_tar(tmp_path / "in" / "0.tar", {f"{i}.png": encoded(i) for i in range(6)})
    write_tar(tmp_path / "in" / "1.tar", {"0.png": encoded(6)})
    os.truncate(tmp_path / "in" / "0.tar", 3 * 1536 + 600)  # in the picture of the fourth
    report = run(tmp_path, shard_size=2, workers=workers)
    assert dropped(report) == {"a damaged or truncated tar": (1, ["0.tar"])}
    names = ["0.tar/0.png", "0.tar/1.png", "0.tar/2.png", "1.tar/0.png"]
    assert [e["name"] for e in read(tmp_path)] == names
    expected = files(tmp_path / "out")
    os.remove(tmp_path / "out" / "shard-00001.array_record")  # continues within a tar
    run(tmp_path, shard_size=2)
    assert files(tmp_path / "out") == expected


def test_parquet(tmp_path):
    pictures = [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(5)]
    pictures[3] = {"bytes": None, "path": "3.png"}
    columns = {
        "image": pictures,
        "TEXT": [f"caption {i}" for i in range(4)] + [None],
        "label": [1, 0, 1, 0, 0],
        "WIDTH": [160.0, float("nan"), 16.0, 1.0, 16.0],
        "HEIGHT": [120.0] * 5,
    }
    write_parquet(tmp_path / "in" / "a.parquet", columns, row_group_size=3)
    report = run(tmp_path, shard_size=2)
    assert dropped(report) == {"no picture": (1, ["a.parquet/3"])}
    source = read(tmp_path)
    found = [(e["name"], e["caption"], source.classes[e["label"]]) for e in source]
    assert found[0] == ("a.parquet/0", "caption 0", "1") and found[3] == ("a.parquet/4", "0", "0")
    assert [e["placement"].original for e in source] == [(120, 160)] + [(12, 16)] * 3
    np.testing.assert_array_equal(
        source[1]["image"], FolderSource(_saved(tmp_path, 1), "all", image_size=SIZE)[0]["image"]
    )
    expected = files(tmp_path / "out")
    os.remove(tmp_path / "out" / "shard-00001.array_record")  # continues within a row group
    run(tmp_path, shard_size=2)
    assert files(tmp_path / "out") == expected


def _saved(tmp_path, seed):
    save(tmp_path / "other" / "1.png", seed)
    return tmp_path / "other"


def test_named_columns_and_classes(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "thumb": [encoded(7), encoded(8)],
        "photo": [encoded(0), encoded(1)],
        "alt": [["first", "second"], []],
        "kind": [1, 0],
    }
    names = {"info": {"features": {"kind": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    made = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(names)})
    (tmp_path / "in").mkdir()
    parquet.write_table(made, tmp_path / "in" / "a.parquet")
    chosen = dict(image_column="photo", caption_column="alt", label_column="kind")
    run(tmp_path, **chosen)
    source = read(tmp_path)
    assert [(e["caption"], e["label"]) for e in source] == [("first", 1), ("cat", 0)]
    assert source.classes == ("cat", "dog")
    assert unpack(source._records[0])[1]["captions"] == ["first", "second"]
    np.testing.assert_array_equal(
        source[0]["image"], FolderSource(_saved(tmp_path, 0), "all", image_size=SIZE)[0]["image"]
    )
    with pytest.raises(ValueError, match="--caption_column=title: .* has the columns thumb, photo"):
        run(tmp_path, "out2", caption_column="title")
    with pytest.raises(ValueError, match="no column with the bytes of pictures; it has thumb"):
        run(tmp_path, "out3", image_column="kind")


SCORES = [
    (dict(max_watermark=0.8), "the watermark score is over 0.8", "no watermark score"),
    (dict(max_unsafe=0.5), "the unsafe score is over 0.5", "no unsafe score"),
    (dict(min_aesthetic=5), "the aesthetic score is under 5", "no aesthetic score"),
]


@pytest.mark.parametrize("options, beyond, without", SCORES)
@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_filters(tmp_path, options, beyond, without, kind):
    scores = [
        {"pwatermark": 0.8, "punsafe": 0.5, "aesthetic": 5},
        {"pwatermark": 0.81, "punsafe": 0.51, "aesthetic_score": 4.9},
        {},
        {"pwatermark": float("nan"), "punsafe": None, "aesthetic": "good"},
    ]
    members = {f"{i}.png": encoded(i) for i in range(4)}
    members |= {f"{i}.json": json.dumps(about) for i, about in enumerate(scores)}
    if kind == "tar":
        write_tar(tmp_path / "in" / "0.tar", dict(sorted(members.items())))
    else:
        (tmp_path / "in").mkdir()
        for name, content in members.items():
            content = content if isinstance(content, bytes) else content.encode()
            (tmp_path / "in" / name).write_bytes(content)
    report = run(tmp_path, **options)
    counts = {reason: count for reason, (count, _) in dropped(report).items()}
    assert report["kept"] == 1 and counts == {beyond: 1, without: 2}
    assert run(tmp_path, "all")["kept"] == 4


def test_min_size(tmp_path):
    for i, side in enumerate((3, 4, 7, 8)):
        save(tmp_path / "in" / f"{i}.png", i, (20, side))
    tars = {f"{i}.png": encoded(i, (20, side)) for i, side in enumerate((3, 4, 7, 8))}
    write_tar(tmp_path / "0.tar", tars)
    for source in ("in", "0.tar"):
        for min_size, kept, limit in ((0, 3, 4), (8, 1, 8)):
            options = Options(image_size=SIZE, min_size=min_size)
            report = prepare(str(tmp_path / source), str(tmp_path / f"{source}{kept}"), options)
            reason = f"the short side is under min_size={limit}"
            assert report["kept"] == kept and dropped(report)[reason][0] == 4 - kept


def test_the_table(many):
    (many / "in" / "a" / "04.txt").write_bytes(b"\xff")
    assert table(run(many)).splitlines() == [
        "       23 read",
        "       20 kept: 5 shards, 0.7 MB",
        "        1 dropped, not a picture that Pillow can read: broken.png",
        "        2 dropped, the same pixels as an earlier picture: b/98.png, b/99.png",
        "        1 captions lost: text that cannot be read",
    ]
