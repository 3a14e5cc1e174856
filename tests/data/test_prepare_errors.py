"""What ldm_jax.prepare says of bad data sets and options."""

import json
import os
import subprocess
import sys

import pytest

from ldm_jax.data import preparation
from ldm_jax.data.filters import Options
from ldm_jax.data.preparation import prepare
from tests.tiny_data_sets import encoded, save, write_parquet, write_tar


def refused(tmp_path, match, error=ValueError, **options):
    with pytest.raises(error, match=match):
        prepare(str(tmp_path / "in"), str(tmp_path / "out"), Options(image_size=8, **options))
    assert not (tmp_path / "out" / "report.json").exists()


def test_no_data_set(tmp_path):
    refused(tmp_path, "--source=.*/in does not exist", FileNotFoundError)
    (tmp_path / "in").mkdir()
    refused(tmp_path, r"/in holds no picture, \.tar or \.parquet file, at any depth")
    (tmp_path / "in" / "notes.txt").touch()
    refused(tmp_path, r"/in holds no \.tar file", kind="tar")
    refused(tmp_path, r"/in holds no picture; looked .* png, jpg", kind="folder")


def test_one_picture_is_no_data_set(tmp_path):
    save(tmp_path / "1.png", 0)
    with pytest.raises(FileNotFoundError, match=r"1\.png' is not a folder"):
        prepare(str(tmp_path / "1.png"), str(tmp_path / "out"), Options(image_size=8))


def test_several_kinds_of_data(tmp_path):
    save(tmp_path / "in" / "1.png", 0)
    write_tar(tmp_path / "in" / "a.tar", {"1.png": encoded(1)})
    refused(tmp_path, "several kinds of data: choose one with --kind=tar or --kind=folder")
    options = Options(image_size=8, kind="tar")
    assert prepare(str(tmp_path / "in"), str(tmp_path / "out"), options)["kept"] == 1


def test_nothing_is_left(tmp_path):
    members = {"1.png": encoded(1), "2.jpg": b"broken", "3.png": encoded(3)}
    members["3.json"] = json.dumps({"pwatermark": 0.9})
    write_tar(tmp_path / "in" / "a.tar", members)
    reasons = r"\(2: no watermark score; 1: the watermark score is over 0.5\)"
    refused(tmp_path, f"/in: of 3 pictures none is left {reasons}", max_watermark=0.5)
    assert not list((tmp_path / "out").glob("shard*"))


def test_a_tar_that_is_none(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(b"<html>404</html>")
    refused(tmp_path, r"of 1 pictures none is left \(1: a damaged or truncated tar\)")


def test_parquet_with_urls_only(tmp_path):
    columns = {"URL": ["https://example.org/1.jpg"], "TEXT": ["a dog"]}
    write_parquet(tmp_path / "in" / "a.parquet", columns)
    refused(
        tmp_path, "a.parquet has no column with the bytes of pictures, only their URLs: .*img2d"
    )


def test_parquet_without_pictures(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", {"image": [1], "text": ["a dog"]})
    refused(tmp_path, "no column with the bytes of pictures; it has image, text")


def test_a_truncated_parquet_file(tmp_path):
    path = tmp_path / "in" / "a.parquet"
    write_parquet(path, {"image": [encoded(1)], "text": ["a dog"]})
    os.truncate(path, path.stat().st_size - 20)
    refused(tmp_path, "a.parquet is not a whole parquet file: ")


def test_a_damaged_parquet_file(tmp_path):
    path = tmp_path / "in" / "a.parquet"
    pictures = [encoded(i, (32, 32)) for i in range(4)]
    write_parquet(path, {"image": pictures}, compression="gzip", row_group_size=2)
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    path.write_bytes(content)
    refused(tmp_path, "a.parquet cannot be read after row 0: ")


def test_pyarrow_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(tmp_path, r"a\.parquet: .*pip install 'ldm_jax\[prepare\]'", ImportError)


def test_a_picture_that_vanishes_stops_the_command(tmp_path, monkeypatch):
    save(tmp_path / "in" / "1.png", 0)
    items = preparation._items

    def vanishing(*args):
        for item in items(*args):
            os.remove(tmp_path / "in" / "1.png")
            yield item

    monkeypatch.setattr(preparation, "_items", vanishing)
    refused(tmp_path, "No such file or directory: .*1.png", FileNotFoundError)


def test_a_worker_that_is_killed(tmp_path, monkeypatch):
    save(tmp_path / "in" / "1.png", 0)
    monkeypatch.setattr(preparation, "_prepare_chunk", os.abort)
    monkeypatch.setattr(preparation, "_start_worker", os.abort)
    with pytest.raises(ChildProcessError, match="fewer than --workers=1; the same command goes on"):
        prepare(str(tmp_path / "in"), str(tmp_path / "out"), Options(image_size=8), 1)


def command(tmp_path, root, *arguments):
    environment = os.environ | {"PYTHONPATH": str(root)}
    whole = [sys.executable, *arguments]
    return subprocess.run(whole, cwd=tmp_path, env=environment, capture_output=True, text=True)


PARSE = """
from absl import flags
import ldm_jax.prepare
size = "--image_size=8"
for given in ([size, "--encoding=gif"], ["--image_size=0"], [size, "--shards=3"], []):
    try:
        flags.FLAGS(["prepare", "--source=in", "--out=out", *given])
    except flags.Error as error:
        print(str(error).replace("\\n", " "))
    flags.FLAGS.unparse_flags()
    flags.FLAGS["image_size"].value = None
"""


def test_flags(tmp_path, root):
    done = command(tmp_path, root, "-c", PARSE)
    messages = done.stdout.splitlines()
    assert len(messages) == 4, done.stderr
    assert "--encoding=gif: value should be one of <webp|png|jpeg>" in messages[0]
    assert "--image_size=0: 0 is not a positive integer" in messages[1]
    assert "Unknown command line flag 'shards'" in messages[2]
    assert "--image_size must have a value other than None" in messages[3]


def test_the_command(tmp_path, root):
    save(tmp_path / "in" / "1.png", 0)
    arguments = ["--source=in", "--out=out", "--image_size=8", "--workers=0"]
    done = command(tmp_path, root, "-m", "ldm_jax.prepare", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "        1 read",
        "        1 kept: 1 shards, 0.1 MB",
        "Train with --config.data.source=shards --config.data.path=out",
    ]
    done = command(tmp_path, root, "-m", "ldm_jax.prepare", *arguments, "--max_unsafe=0.5")
    assert done.returncode == 1 and "error: --out=" in done.stderr
    assert "was begun with --max_unsafe=None, now it is 0.5" in done.stderr
