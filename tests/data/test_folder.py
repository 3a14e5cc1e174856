"""Folders of pictures: every kind of file, good and bad, and where classes and captions are."""

import json
import logging
import os
import pickle

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image, features

from ldm_jax.data.folder import FolderSource, _readable
from ldm_jax.data.images import fit, read_image
from ldm_jax.data.placement import Placement
from ldm_jax.data.sources import open_source
from ldm_jax.data.splits import is_held_out


def save(path, color=(200, 100, 50), size=(16, 16), mode="RGB", **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **kwargs)


def folder(path, split="all", **kwargs):
    return FolderSource(path, split, image_size=16, **kwargs)


def only(path, **kwargs):
    source = folder(path, **kwargs)
    assert len(source) == 1
    return source[0]


@pytest.mark.parametrize(
    ("file", "mode", "color", "expected"),
    [
        ("a.png", "RGB", (200, 100, 50), (200, 100, 50)),
        ("a.PNG", "L", 77, (77, 77, 77)),
        ("a.png", "1", 1, (255, 255, 255)),
        ("a.bmp", "RGB", (1, 2, 3), (1, 2, 3)),
        ("a.png", "RGBA", (255, 0, 0, 0), (0, 0, 255)),
        ("a.webp", "RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("a.png", "LA", (100, 51), (20, 20, 224)),
        ("a.tif", "CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("a.png", "I;16", 65535, (255, 255, 255)),
        ("a.png", "I;16", 257 * 40, (40, 40, 40)),
        ("a.tiff", "I;16", 257 * 200 + 100, (200, 200, 200)),
        ("a.gif", "P", 0, (0, 0, 0)),
    ],
)
def test_modes(tmp_path, file, mode, color, expected):
    save(tmp_path / file, color, mode=mode, **({"lossless": True} if "webp" in file else {}))
    image = only(tmp_path, background=(0, 0, 255))["image"]
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.broadcast_to(np.uint8(expected), (16, 16, 3)))


def test_palette_with_a_transparent_color(tmp_path):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(0, (0, 0, 8, 16))
    image.save(tmp_path / "a.png", transparency=0)
    example = only(tmp_path)
    assert example["image"][0, 0].tolist() == [255, 255, 255]
    assert example["image"][0, 15].tolist() == [0, 255, 0]
    assert example["rgba"][0, 0, 3] == 0


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("L", (16, 16), value) for value in (10, 250)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (only(tmp_path)["image"] == 10).all()


def test_exif_orientation(tmp_path):
    image = Image.new("RGB", (32, 16), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: turn clockwise to see it
    image.save(tmp_path / "a.png", exif=exif)
    upright = read_image(tmp_path / "a.png")
    assert upright.shape == (32, 16, 3)
    assert (upright[:16] == 0).all() and (upright[16:] == 255).all()


def test_resize_and_centre_crop():
    image = np.zeros((40, 120, 3), np.uint8)
    image[:, 40:80] = 200
    assert (fit(image, (20, 20))[:, 3:-3] == 200).all()
    checkers = np.indices((64, 64)).sum(0) % 2 * 255
    grey = fit(np.repeat(checkers[..., None], 3, -1).astype(np.uint8), (8, 8))
    assert np.abs(grey.astype(int) - 127).max() <= 2  # an aliased one would be black or white
    assert fit(image, (40, 40)).shape == (40, 40, 3)


def broken_files(path):
    """One good picture and one of each kind that opening finds; what is said about each, why."""
    save(path / "good.png")
    save(path / "tiny.png", size=(7, 20))
    (path / "zero.png").touch()
    (path / "text.jpg").write_text("not a picture")
    (path / "stub.png").write_bytes((path / "good.png").read_bytes()[:20])
    (path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (path / "gone.jpg").symlink_to(path / "nowhere.jpg")
    os.mkfifo(path / "pipe.png")
    Image.new("F", (16, 16)).save(path / "float.tiff")
    return {
        "tiny.png": ("7x20 pixels, ", "the short side is under min_size=8"),
        "zero.png": ("", "the file is empty (0 bytes)"),
        "text.jpg": ("", "not a picture that Pillow can read"),
        "stub.png": ("", "damaged"),
        "phone.heic": ("", "the installed Pillow cannot read .heic files"),
        "gone.jpg": ("", "a link that leads nowhere"),
        "pipe.png": ("", "not a regular file"),
        "float.tiff": ("", "pixels of mode F beyond 16 bits are not supported"),
    }


def test_bad_files_are_skipped_by_name(tmp_path, caplog):
    faults = broken_files(tmp_path)
    source = folder(tmp_path)
    assert [e["name"] for e in source] == ["good.png"]
    for name, (before, reason) in faults.items():
        told = f"skipped {tmp_path / name}: {before}{reason}"
        assert [m for m in caplog.messages if m.startswith(told)], (name, caplog.messages)
    assert caplog.messages[-1] == f"{tmp_path}: skipped 8 of 9 pictures"
    assert source.left_out == {reason: 1 for _, reason in faults.values()}


def cut(path):
    """A picture whose header is whole, and whose pixels are not."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1500])


def test_a_picture_that_breaks_is_replaced_by_the_next_of_its_class(tmp_path, caplog):
    for name in ("a/1.png", "a/4.png", "b/1.png", "c/2.png"):
        save(tmp_path / name)
    for name in ("a/2.jpg", "a/3.png", "a/5.png", "c/1.png"):
        cut(tmp_path / name)
    save(tmp_path / "b/2.png")
    source = folder(tmp_path)
    assert len(source) == 9 and not source.left_out
    caplog.clear()
    (tmp_path / "b/1.png").unlink()
    expected = ["a/1", "a/4", "a/4", "a/4", "a/1", "b/2", "b/2", "c/2", "c/2"]
    for _ in range(2):
        assert [e["name"] for e in source] == [f"{name}.png" for name in expected]
    assert [source.describe(i)["name"] for i in range(9)] == [f"{name}.png" for name in expected]
    assert source.left_out == {"damaged": 5} and len(caplog.messages) == 5
    for name in ("a/2.jpg", "a/3.png", "a/5.png", "b/1.png", "c/1.png"):
        told = f"{tmp_path / name} cannot be read, another picture replaces it: "
        assert [m for m in caplog.messages if m.startswith(told)]


def test_a_class_that_breaks_is_replaced_by_another(tmp_path):
    cut(tmp_path / "a/1.png")
    save(tmp_path / "b/1.png")
    source = folder(tmp_path)
    example = source[0]
    assert (example["name"], example["label"], example["caption"]) == ("b/1.png", 1, "b")


def test_a_picture_that_breaks_raises_with_its_name(tmp_path):
    cut(tmp_path / "1.png")
    save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"1\.png: damaged: .*truncated"):
        folder(tmp_path, on_error="raise")[0]


def test_nothing_can_be_read_any_more(tmp_path):
    cut(tmp_path / "in" / "1.png")
    source = folder(tmp_path / "in")
    with pytest.raises(ValueError, match=r"in: no picture can be read any more"):
        source[0]
    (tmp_path / "in").rename(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"in' is gone"):
        source[0]


def test_at_most_ten_warnings(tmp_path, caplog):
    save(tmp_path / "good.png")
    for i in range(12):
        (tmp_path / f"{i}.png").touch()
    with caplog.at_level(logging.WARNING, logger="absl"):
        folder(tmp_path)
    assert len(caplog.messages) == 11 and "skipped 12 of 13" in caplog.messages[-1]


def test_on_error_raise(tmp_path):
    (tmp_path / "zero.png").touch()
    with pytest.raises(ValueError, match=r"zero\.png: the file is empty"):
        folder(tmp_path, on_error="raise")
    with pytest.raises(ValueError, match='\'ignore\'; choose "skip" or "raise"'):
        folder(tmp_path, on_error="ignore")


def test_min_size(tmp_path):
    save(tmp_path / "a.png", size=(7, 7))
    assert only(tmp_path, min_size=7)["image"].shape == (16, 16, 3)
    (tmp_path / "zero.png").touch()
    with pytest.raises(
        ValueError,
        match=r"none of its 2 pictures is usable .1: the short .* min_size=8; 1: the file is empty",
    ):
        folder(tmp_path)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' is not a folder"):
        folder(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no picture")
    save(tmp_path / ".thumbnails" / "hidden.png")
    with pytest.raises(ValueError, match=f"{tmp_path} holds no picture; looked .* png, jpg"):
        folder(tmp_path)


def test_classes(tmp_path):
    for name in ("dog/1.png", "cat/deep/2.png", "3.png"):
        save(tmp_path / name)
    source = folder(tmp_path)
    assert source.classes == ("", "cat", "dog")
    found = [(e["name"], e["label"], e["caption"]) for e in source]
    assert found == [("3.png", 0, ""), ("cat/deep/2.png", 1, "cat"), ("dog/1.png", 2, "dog")]
    save(tmp_path / "flat" / "a.png")
    assert folder(tmp_path / "flat").classes == ("",)


def test_captions(tmp_path):
    for name in ("dog/1.png", "dog/2.png", "dog/3.png", "dog/4.png"):
        save(tmp_path / name)
    (tmp_path / "dog" / "1.txt").write_text(" a brown dog\n")
    write_lines(
        tmp_path / "metadata.jsonl",
        {"file_name": "dog/1.png", "text": "the .txt goes first"},
        {"file_name": "dog/2.png", "text": "a café dog"},
        {"file_name": "dog/3.png", "text": "the nearer file goes first"},
    )
    write_lines(tmp_path / "dog" / "metadata.jsonl", {"file_name": "3.png", "caption": "a dog"})
    assert [e["caption"] for e in folder(tmp_path)] == ["a brown dog", "a café dog", "a dog", "dog"]


def write_lines(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def test_malformed_metadata(tmp_path):
    save(tmp_path / "a.png")
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "fine"}, {"file": "b"})
    with pytest.raises(ValueError, match=r'metadata\.jsonl:2: expected \{"file_name": .*"file"'):
        folder(tmp_path)


def test_splits(tmp_path):
    for i in range(30):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", size=(8, 8))
    config = ConfigDict({"source": "folder", "path": str(tmp_path), "image_size": 8})
    config.held_out = 0.3
    train, held_out, both = (open_source(config, s) for s in ("train", "held_out", "all"))
    names = [[e["name"] for e in source] for source in (train, held_out, both)]
    assert sorted(names[0] + names[1]) == names[2] and len(names[2]) == 30
    assert len(names[1]) == 10 and train.classes == held_out.classes == ("a", "b")
    config.held_out = 0.0
    assert [len(open_source(config, split)) for split in ("train", "held_out")] == [30, 0]


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.9, 1.0])
def test_small_sets_train(tmp_path, count, fraction):
    for i in range(count):
        save(tmp_path / f"{i}.png")
    sizes = [len(folder(tmp_path, s, held_out=fraction)) for s in ("train", "held_out", "all")]
    assert sizes[0] >= 1 and sizes[0] + sizes[1] == sizes[2] == count
    assert sizes[1] == 0 or fraction not in (0.0, 1.0)


def small(path, **kwargs):
    return ConfigDict({"source": "folder", "path": str(path), "image_size": 16} | kwargs)


def test_a_class_that_is_held_out_as_a_whole_trains(tmp_path):
    names = [f"{c}/{i}.png" for c in "ab" for i in range(20)]
    chosen = [n for n in names if n[0] == "a" or is_held_out(n, 0.5)]
    for name in chosen:
        save(tmp_path / name)
    in_b = sum(name[0] == "b" for name in chosen)
    config = small(tmp_path, held_out=0.5, classes=("b",))
    sizes = [len(open_source(config, split)) for split in ("train", "held_out", "all")]
    assert sizes == [in_b, 0, in_b]
    config.classes = ("a",)
    sizes = [len(open_source(config, split)) for split in ("train", "held_out")]
    assert min(sizes) > 0 and sum(sizes) == 20


def test_one_class_without_held_out_pictures(tmp_path):
    for i in range(3):
        save(tmp_path / "a" / f"{i}.png")
        save(tmp_path / "b" / f"{i}.png")
    config = small(tmp_path, held_out=0.0, classes=("b",))
    assert [len(open_source(config, split)) for split in ("train", "held_out")] == [3, 0]
    cut(tmp_path / "b" / "0.png")
    (tmp_path / "a" / "3.png").touch()
    subset = open_source(config, "all")
    assert [e["name"] for e in subset] == ["b/1.png", "b/1.png", "b/2.png"]
    assert subset.describe(2)["name"] == "b/2.png"
    assert subset.left_out == {"the file is empty (0 bytes)": 1, "damaged": 1}


def test_examples_tell_where_they_come_from(tmp_path, monkeypatch):
    save(tmp_path / "a" / "1.png", size=(40, 20))
    monkeypatch.chdir(tmp_path.parent)
    source = folder(tmp_path.name)
    example = source[0]
    assert example["path"] == str(tmp_path / "a" / "1.png")
    assert example["placement"] == Placement.centre((20, 40), (16, 16))
    told = {"caption": "a", "label": 0, "name": "a/1.png", "path": str(tmp_path / "a" / "1.png")}
    assert source.describe(0) == told == source.describe(-1)
    with pytest.raises(IndexError):
        source.describe(1)


def test_home_is_expanded(tmp_path, monkeypatch):
    save(tmp_path / "data" / "1.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert only("~/data")["path"] == str(tmp_path / "data" / "1.png")


def test_sources_can_be_sent_to_other_processes(tmp_path):
    save(tmp_path / "1.png")
    example = pickle.loads(pickle.dumps(folder(tmp_path)))[0]
    assert example["name"] == "1.png"


@pytest.mark.parametrize(
    "file", ["a.avif", "a.jfif", "a.jpe", "a.JPG", "a.jp2", "a.ppm", "a.tga", "a.qoi", "a.mpo"]
)
def test_formats(tmp_path, file):
    save(tmp_path / file)
    assert np.abs(only(tmp_path)["image"].astype(int) - (200, 100, 50)).max() <= 4


def test_a_format_that_this_pillow_was_built_without(tmp_path, monkeypatch):
    save(tmp_path / "a.avif")
    save(tmp_path / "b.png")
    monkeypatch.setattr(features, "check", lambda codec: codec != "avif")
    _readable.cache_clear()
    assert folder(tmp_path).left_out == {"the installed Pillow cannot read .avif files": 1}
    _readable.cache_clear()


def test_hidden_files_are_no_data(tmp_path):
    names = [".hidden.png", ".ipynb_checkpoints/1.png", "a/.ipynb_checkpoints/2.png", "a/._x.jpg"]
    for name in [*names, "a/x.jpg"]:
        save(tmp_path / name)
    (tmp_path / "a" / ".broken.png").touch()
    source = folder(tmp_path)
    assert [e["name"] for e in source] == ["a/x.jpg"] and source.left_out == {}
    save(tmp_path / ".cache" / "deep" / "1.png")
    assert only(tmp_path / ".cache")["name"] == "deep/1.png"


def test_pictures_about_another_are_none_themselves(tmp_path):
    for name in ("a.jpg", "a.depth.png", "a.segmentation.png", "b.depth.png", "a.2.png"):
        save(tmp_path / name)
    assert [e["name"] for e in folder(tmp_path)] == ["a.2.png", "a.jpg", "b.depth.png"]


def test_names_that_are_no_utf8(tmp_path, caplog):
    strange = os.fsdecode(b"caf\xe9")
    save(tmp_path / strange / "1.png")
    save(tmp_path / "dog" / f"{strange}.png")
    (tmp_path / "dog" / f"{strange}.txt").write_text("a dog")
    (tmp_path / f"{strange}.jpg").touch()
    train = folder(tmp_path)
    assert train.classes == ("caf\\xe9", "dog")
    told = [(e["name"], e["caption"], os.path.isfile(e["path"])) for e in train]
    assert told == [("caf\\xe9/1.png", "", True), ("dog/caf\\xe9.png", "a dog", True)]
    text = "\n".join(caplog.messages)
    assert "2 names are not UTF-8, such as caf\\xe9/1.png" in text and text.encode()
    assert r"skipped " in text and r"caf\xe9.jpg: the file is empty" in text
    with pytest.raises(ValueError, match=r"caf\\xe9\.jpg: the file is empty"):
        folder(tmp_path, on_error="raise")


def test_splits_of_one_folder_say_the_same_once(tmp_path, caplog):
    save(tmp_path / "1.png")
    (tmp_path / "2.png").touch()
    folder(tmp_path, "train"), folder(tmp_path, "held_out")
    assert len(caplog.messages) == 2
    (tmp_path / "3.png").touch()
    folder(tmp_path, "held_out")
    assert len(caplog.messages) == 5
