"""Listing a folder with its links, and the index: what is opened again, and what is not."""

import json
import os
import threading
import time

import pytest
from PIL import Image

from ldm_jax.data import folder as folder_module
from ldm_jax.data.folder import FolderSource
from ldm_jax.data.index import examine, folder_index, list_files


def save(path, size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def names(path):
    return sorted(list_files(str(path)).files)


@pytest.fixture
def opened(monkeypatch):
    """The names of the pictures whose header was read, to be cleared by the test."""
    read, found = folder_module._read_header, []

    def watched(file):
        found.append(os.path.basename(file.path))
        return read(file)

    monkeypatch.setattr(folder_module, "_read_header", watched)
    return found


def test_links_are_followed(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    save(root / "own" / "1.png")
    save(elsewhere / "deep" / "2.png")
    save(tmp_path / "3.png")
    (root / "linked").symlink_to(elsewhere)
    (root / "file.png").symlink_to(tmp_path / "3.png")
    assert names(root) == ["file.png", "linked/deep/2.png", "own/1.png"]
    (tmp_path / "link").symlink_to(root)
    source = FolderSource(tmp_path / "link", "all", image_size=16)
    assert [e["name"] for e in source] == names(root) and source.classes == ("", "linked", "own")


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("loop", "."),
        ("a/loop", ".."),
        ("a/b/loop", "../.."),
        ("a/loop", "../a"),
        ("up", ".."),
        ("above", "../.."),
        ("root", "/"),
        ("self", "self"),
        ("b", "a"),
    ],
)
def test_loops_end(tmp_path, link, target, caplog):
    root = tmp_path / "in" / "root"
    save(root / "a" / "1.png")
    save(root / "a" / "b" / "2.png")
    save(tmp_path / "in" / "outside.png")
    (root / link).symlink_to(target)
    assert names(root) == ["a/1.png", "a/b/2.png"]
    source = FolderSource(root, "all", image_size=16)
    assert len(source) == 2 and source.left_out == {}
    told = [m for m in caplog.messages if m.startswith(f"{root}/{link}/ is not entered")]
    assert len(told) == (link != "self")


def test_folders_that_link_to_each_other(tmp_path):
    for own, other in ("ab", "ba"):
        save(tmp_path / own / "1.png")
        (tmp_path / own / "other").symlink_to(f"../{other}")
    assert names(tmp_path) == ["a/1.png", "b/1.png"]


def test_a_folder_linked_twice_is_entered_once(tmp_path):
    root = tmp_path / "root"
    save(tmp_path / "elsewhere" / "1.png")
    root.mkdir()
    for link in ("second", "first"):
        (root / link).symlink_to("../elsewhere")
    listing = list_files(str(root))
    assert list(listing.files) == ["first/1.png"] and listing.repeated == {"second/": "first/"}


def test_a_folder_that_cannot_be_read_is_counted(tmp_path, monkeypatch):
    save(tmp_path / "1.png")
    save(tmp_path / "closed" / "2.png")
    scandir = os.scandir

    def closed(path):
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    reason = "the folder cannot be read (Permission denied)"
    assert FolderSource(tmp_path, "all", image_size=16).left_out == {reason: 1}
    with pytest.raises(ValueError, match="closed/: the folder cannot be read"):
        FolderSource(tmp_path, "all", image_size=16, on_error="raise")


@pytest.mark.parametrize("in_file", [True, False])
def test_only_new_and_changed_files_are_opened(tmp_path, opened, in_file):
    root, index = tmp_path / "root", tmp_path / "run" / "index.json" if in_file else None

    def names(split="train"):
        opened.clear()
        source = FolderSource(root, split, image_size=16, held_out=0, index=index)
        return [source.describe(i)["name"] for i in range(len(source))]

    for name in "1234":
        save(root / f"{name}.png")
    (root / "bad.png").write_text("broken")
    assert names() == ["1.png", "2.png", "3.png", "4.png"] and len(opened) == 5
    assert names("held_out") == [] and opened == []
    assert names("all") == ["1.png", "2.png", "3.png", "4.png"] and opened == []

    save(root / "5.png")
    (root / "1.png").unlink()
    (root / "2.png").write_bytes(b"broken")
    save(root / "bad.png")
    os.utime(root / "3.png", ns=(1, 1))
    assert names() == ["3.png", "4.png", "5.png", "bad.png"]
    assert sorted(opened) == ["2.png", "3.png", "5.png", "bad.png"]
    assert names() == ["3.png", "4.png", "5.png", "bad.png"] and opened == []
    save(root / "1.png")
    assert "1.png" in names() and opened == ["1.png"]


@pytest.mark.parametrize("in_file", [True, False])
def test_captions_follow_their_files(tmp_path, in_file):
    root, index = tmp_path / "root", tmp_path / "index.json" if in_file else None

    def caption():
        return FolderSource(root, "all", image_size=16, index=index).describe(0)["caption"]

    save(root / "a" / "1.png")
    assert caption() == "a"
    (root / "a" / "1.txt").write_text("first")
    assert caption() == "first"
    (root / "a" / "1.txt").write_text("second")
    assert caption() == "second"
    (root / "a" / "1.txt").write_bytes(b"\xff")
    assert caption() == "a"
    (root / "a" / "1.txt").unlink()
    assert caption() == "a"


def test_min_size_is_no_part_of_the_index(tmp_path):
    save(tmp_path / "root" / "1.png", (16, 10))
    for min_size, count in ((10, 1), (11, 0), (10, 1)):
        kwargs = dict(image_size=16, min_size=min_size, index=tmp_path / "index.json")
        if count:
            assert len(FolderSource(tmp_path / "root", "all", **kwargs)) == 1
        else:
            with pytest.raises(ValueError, match="10 pixels|under min_size=11"):
                FolderSource(tmp_path / "root", "all", **kwargs)


def test_nothing_is_written_into_the_folder(tmp_path):
    root = tmp_path / "root"
    save(root / "1.png")
    os.utime(root, ns=(1, 1))
    source = FolderSource(root, "all", image_size=16, index=tmp_path / "index.json")
    assert len(source) and source[0]["name"] == "1.png"
    assert os.stat(root).st_mtime_ns == 1 and os.listdir(root) == ["1.png"]
    assert sorted(os.listdir(tmp_path)) == ["index.json", "root"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff",
        b"[]",
        b"null",
        b"{}",
        b'{"format": 1}',
        "half",
        "other version",
        '{"format": FORMAT, "pictures": {"1.png": [1, 2]}}',
        '{"format": FORMAT, "pictures": {"1.png": 5}}',
        '{"format": FORMAT, "pictures": 5}',
    ],
)
def test_a_damaged_index_is_made_anew(tmp_path, opened, content):
    index = tmp_path / "index.json"
    save(tmp_path / "root" / "1.png")
    FolderSource(tmp_path / "root", "all", index=index, image_size=16)
    whole = index.read_bytes()
    if content == "half":
        content = whole[: len(whole) // 2]
    elif content == "other version":
        content = whole.replace(b"Pillow ", b"Pillow 1")
    elif isinstance(content, str):
        content = content.replace("FORMAT", json.dumps(json.loads(whole)["format"])).encode()
    index.write_bytes(content)
    opened.clear()
    assert len(FolderSource(tmp_path / "root", "all", index=index, image_size=16)) == 1
    assert opened == ["1.png"] and index.read_bytes() == whole


def test_an_index_that_cannot_be_written(tmp_path, caplog):
    save(tmp_path / "root" / "1.png")
    (tmp_path / "file").touch()
    for index in (tmp_path / "file" / "index.json", tmp_path / "root"):
        assert len(FolderSource(tmp_path / "root", "all", index=index, image_size=16)) == 1
        assert "the index cannot be written" in caplog.text
        caplog.clear()
    assert sorted(os.listdir(tmp_path)) == ["file", "root"]


def test_names_that_are_no_utf8_are_kept(tmp_path, opened):
    name = os.fsdecode(b"caf\xe9.png")
    save(tmp_path / "root" / name)
    for expected in ([name], []):
        opened.clear()
        FolderSource(tmp_path / "root", "all", index=tmp_path / "index.json", image_size=16)
        assert opened == expected


def test_a_fault_of_the_storage_is_not_remembered(tmp_path, monkeypatch):
    save(tmp_path / "root" / "1.png")
    save(tmp_path / "root" / "2.png")
    index = tmp_path / "index.json"

    def broken(path):
        if "1.png" in str(path):
            raise OSError(5, "Input/output error")
        return 16, 16

    monkeypatch.setattr(folder_module, "read_shape", broken)
    source = FolderSource(tmp_path / "root", "all", index=index, image_size=16)
    assert source.left_out == {"the file cannot be read (Input/output error)": 1}
    monkeypatch.undo()
    assert len(FolderSource(tmp_path / "root", "all", index=index, image_size=16)) == 2


def test_an_interruption_stops_soon_and_keeps_what_was_found(tmp_path, monkeypatch):
    for i in range(2000):
        (tmp_path / f"{i}.png").touch()
    files, index, calls = list_files(str(tmp_path)).files, tmp_path / "index.json", []

    def read(file):
        calls.append(file)
        time.sleep(0.001)
        return 1, ""

    def interrupted(bar, count):
        raise KeyboardInterrupt  # as Ctrl-C does, in the main thread

    monkeypatch.setattr("ldm_jax.data.index.tqdm.update", interrupted)
    with pytest.raises(KeyboardInterrupt), folder_index(str(tmp_path), index) as known:
        examine(known.setdefault("pictures", {}), files, read, "")
    assert len(calls) < 1800
    with folder_index(str(tmp_path), index) as known:
        assert 0 < len(known["pictures"]) < 1800
    assert not [t for t in threading.enumerate() if "ThreadPool" in t.name]
