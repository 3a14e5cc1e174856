"""Captions of users' folders: which match a picture, which are lost, and their number."""

import codecs
import json
import os
import unicodedata

import pytest
from PIL import Image

from ldm_jax.data.folder import FolderSource

ABSENT, AMBIGUOUS = "no such picture", "several pictures of nearly this name"
SECOND, UNREADABLE = "another caption for the same picture", "text that cannot be read"


@pytest.fixture
def make(tmp_path):
    """Makes pictures of these names in a folder, and gives it."""

    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16)).save(tmp_path / name)
        return tmp_path

    return make


def opened(path, **kwargs):
    return FolderSource(path, "all", image_size=16, **kwargs)


def captions(path, **kwargs):
    source = opened(path, **kwargs)
    return [source.describe(i)["caption"] for i in range(len(source))]


def lines(*pairs, key="text"):
    return "".join(json.dumps({"file_name": name, key: text}) + "\n" for name, text in pairs)


E_COMPOSED = unicodedata.normalize("NFC", "café")
E_DECOMPOSED = unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize(
    ("where", "name", "picture"),
    [
        ("", "./a/1.png", "a/1.png"),
        ("", "a//1.png", "a/1.png"),
        ("", "a\\1.png", "a/1.png"),
        ("", ".\\a\\b\\1.png", "a/b/1.png"),
        ("", "A/1.PNG", "a/1.png"),
        ("", "a/1.png", "A/1.PNG"),
        ("", f"{E_COMPOSED}.png", f"{E_DECOMPOSED}.png"),
        ("", f"{E_DECOMPOSED}.png", f"{E_COMPOSED}.png"),
        ("", f"{E_COMPOSED.upper()}.png", f"{E_DECOMPOSED}.png"),
        ("", "ROT\\STRASSE.png", "rot/straße.png"),
        ("lists", "../1.png", "1.png"),
        ("lists", "..\\a\\1.png", "a/1.png"),
        ("lists", "../lists/./x/../1.png", "lists/1.png"),
        ("", "a/../../in/1.png", "1.png"),
        ("", "../in/a/1.png", "a/1.png"),
        ("", "back\\slash.png", "back\\slash.png"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_names_that_nearly_match(tmp_path, make, where, name, picture, kind):
    make(f"in/{picture}")
    (tmp_path / "in" / where).mkdir(exist_ok=True)
    text = lines((name, "found")) if kind == "jsonl" else f'file_name,text\n"{name}",found\n'
    (tmp_path / "in" / where / f"metadata.{kind}").write_text(text, encoding="utf-8")
    source = opened(tmp_path / "in")
    assert source.describe(0)["caption"] == "found" and source.lost_captions == {}


def test_an_absolute_name(make):
    root = make("a/1.png")
    (root / "metadata.jsonl").write_text(lines((str(root / "a" / "1.png"), "found")))
    assert captions(root) == ["found"]


@pytest.mark.parametrize(
    "name", ["x.png", "../1.png", "/1.png", "C:\\1.png", ".hidden.png", "", "a", "\ud83d.png"]
)
def test_absent_pictures_are_named_and_counted(make, caplog, name):
    root = make("in/1.png", ".hidden.png") / "in"
    text = "\n" + lines((name, "lost"), ("1.png", "kept"), *[("gone.png", "lost")] * 4)
    (root / "metadata.jsonl").write_text(text)
    source = opened(root)
    assert source.describe(0)["caption"] == "kept" and source.lost_captions == {ABSENT: 5}
    shown = name.replace("\ud83d", "\\ud83d")
    assert caplog.messages == [
        f"{root}/metadata.jsonl:2 names {shown}, which is not there",
        f"{root}/metadata.jsonl:4 names gone.png, which is not there",
        f"{root}/metadata.jsonl:5 names gone.png, which is not there",
        f"{root}: 5 captions lost: no such picture",
    ]
    assert opened(root, on_error="raise").lost_captions == {ABSENT: 5}


def test_ambiguous_names(make, caplog):
    root = make("A.png", "a.PNG", "b.png", "B.png")
    (root / "metadata.jsonl").write_text(lines(("a.png", "either"), ("b.png", "exact")))
    (root / "c.png").mkdir()
    (root / "A.TXT").write_text("of A.png")
    source = opened(root)
    told = {source.describe(i)["name"]: source.describe(i)["caption"] for i in range(4)}
    assert told == {"A.png": "of A.png", "a.PNG": "", "B.png": "", "b.png": "exact"}
    assert source.lost_captions == {AMBIGUOUS: 1}
    assert "names a.png, which could be any of A.png, a.PNG" in caplog.messages[0]


def test_ambiguous_text_beside(make):
    root = make("bÉ.png", "BÉ.png")
    (root / "Bé.txt").write_text("either")
    source = opened(root)
    assert source.lost_captions == {AMBIGUOUS: 1} and source.describe(0)["caption"] == ""


def test_the_first_of_two_lines_wins(make, caplog):
    root = make("1.png", "2.png", "sub/3.png")
    two = lines(("1.png", "first"), ("./1.PNG", "second"), ("2.png", "2"), ("sub/3.png", "far"))
    (root / "metadata.jsonl").write_text(two)
    (root / "metadata.csv").write_text("file_name,text\n1.png,third\n2.png,2\n")
    (root / "sub" / "metadata.jsonl").write_text(lines(("3.png", "near")))
    assert captions(root) == ["first", "2", "near"]
    assert opened(root).lost_captions == {SECOND: 2}
    seconds = [message for message in caplog.messages if "a second time" in message]
    assert seconds[0] == (
        f"{root}/metadata.jsonl:2 names ./1.PNG a second time; the first line counts"
    )
    assert seconds[1].startswith(f"{root}/metadata.csv:2 names 1.png")


@pytest.mark.parametrize(
    "text",
    [
        "file_name,text\n1.png,a cat\n2.png,a dog\n",
        "text,file_name\r\na cat,1.png\r\na dog,2.png\r\n",
        "id;file_name;caption\n0;1.png;a cat\n\n1;2.png;a dog",
        'file_name\ttext\textra\n1.png\t"a cat"\n2.png\ta dog\tno column\tof this\n',
        '"file_name", "text"\n"1.png", a cat\n2.png,a dog\n',
    ],
)
@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv(make, text, mark):
    root = make("1.png", "2.png")
    (root / "metadata.csv").write_bytes(text.replace('", "', '","').encode(mark))
    assert captions(root) == ["a cat", "a dog"]


def test_csv_with_quotes_and_lines(make):
    root = make("1.png", "2.png")
    text = 'file_name,text\n1.png,"a ""big"" cat,\nasleep"\nx.png,lost\n'
    (root / "metadata.csv").write_text(text)
    source = opened(root)
    assert source.describe(0)["caption"] == 'a "big" cat,\nasleep'
    assert source.lost_captions == {ABSENT: 1}


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("metadata.csv", "1.png,a cat\n", 1),
        ("metadata.csv", "file_name,label\n1.png,cat\n", 1),
        ("metadata.csv", "file_name,text\n1.png,a cat\n2.png\n", 3),
        ("metadata.csv", 'file_name,text\n1.png,"a cat\n', 2),
        ("metadata.jsonl", '{"file_name": "1.png", "text": "fine"}\n{"file_name": "2.pn', 2),
        ("metadata.jsonl", '\n\n["1.png", "a cat"]', 3),
        ("metadata.jsonl", '{"file_name": "1.png", "text": null}', 1),
        ("metadata.jsonl", '{"file_name": "1.png", "text": 5}', 1),
        ("metadata.jsonl", '{"file_name": 1, "text": "a cat"}', 1),
        ("metadata.jsonl", '{"file_name": "1.png", "label": "cat"}', 1),
        ("metadata.jsonl", '"text file_name"', 1),
    ],
)
@pytest.mark.parametrize("on_error", ["skip", "raise"])
def test_malformed_lists_raise_with_their_line(make, file, content, line, on_error):
    root = make("1.png", "2.png")
    (root / file).write_text(content)
    with pytest.raises(ValueError, match=rf"{file}:{line}: "):
        opened(root, on_error=on_error)


def test_beside(make):
    root = make(
        "1.png", "2.jpg", "3.png", "4.png", "5.png", "6.png", "a.b.png", f"{E_COMPOSED}.png"
    )
    (root / "1.caption").write_text("one")
    (root / "2.txt").write_text("two")
    (root / "2.caption").write_text("not this")
    (root / "3.TXT").write_text("three")
    (root / "5.txt").write_text(" \n")
    (root / "a.b.txt").write_text("six")
    (root / f"{E_DECOMPOSED}.txt").write_text("seven")
    (root / "README.txt").write_bytes(b"\xff no caption")
    (root / "metadata.jsonl").write_text(lines(("4.png", "four"), ("5.png", "5"), ("6.png", "6")))
    assert captions(root) == ["one", "two", "three", "four", "", "6", "six", "seven"]
    assert opened(root).lost_captions == {}


@pytest.mark.parametrize(
    "content",
    [
        "ein Gänseblümchen 🌼".encode(),
        codecs.BOM_UTF8 + "ein Gänseblümchen 🌼\r\n".encode(),
        "ein Gänseblümchen 🌼".encode("utf-16"),
        codecs.BOM_UTF16_BE + " ein Gänseblümchen 🌼".encode("utf-16-be"),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "caption"])
def test_encodings_that_are_read(make, content, suffix):
    root = make("1.png")
    (root / f"1.{suffix}").write_bytes(content)
    assert captions(root) == ["ein Gänseblümchen 🌼"]


@pytest.mark.parametrize(
    "content",
    [
        "ein Gänseblümchen".encode("latin-1"),
        "雛菊".encode("shift-jis"),
        "ein Gänseblümchen".encode("utf-16-le"),
        "a daisy".encode("utf-32"),
        codecs.BOM_UTF16_LE + b"a",
        codecs.BOM_UTF16_LE + b"\x00\xd8",
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "caption"])
def test_text_that_cannot_be_read_is_lost_by_name(make, caplog, content, suffix):
    root = make("daisy/1.png")
    (root / "daisy" / f"1.{suffix}").write_bytes(content)
    source = opened(root)
    assert source.describe(0)["caption"] == "daisy" and source.lost_captions == {UNREADABLE: 1}
    assert source.left_out == {}
    assert caplog.messages[0].startswith(f"{root}/daisy/1.{suffix} is not ")
    assert caplog.messages[0].endswith("save it as UTF-8")
    with pytest.raises(ValueError, match=rf"daisy/1\.{suffix} is not .*; save it as UTF-8"):
        opened(root, on_error="raise")


@pytest.mark.parametrize("file", ["metadata.jsonl", "metadata.csv"])
def test_lines_that_are_no_utf8_are_lost_one_by_one(make, caplog, file):
    root = make("d/1.png", "d/2.png", os.fsdecode(b"d/caf\xe9.png"))
    if file == "metadata.jsonl":
        rows = [b'{"file_name": "d/%s.png", "text": "%s"}' % pair for pair in LATIN]
    else:
        rows = [b"file_name,text", *(b"d/%s.png,%s" % pair for pair in LATIN)]
    (root / file).write_bytes(b"\n".join(rows))
    assert captions(root) == ["d", "fine", "cafe"]
    assert opened(root).lost_captions == {UNREADABLE: 1}
    line = 1 if file == "metadata.jsonl" else 2
    assert caplog.messages[0] == f"{root}/{file}:{line} is not UTF-8; save the file as UTF-8"
    with pytest.raises(ValueError, match=f"{file}:{line} is not UTF-8"):
        opened(root, on_error="raise")


LATIN = [(b"1", "ein Gänseblümchen".encode("latin-1")), (b"2", b"fine"), (b"caf\xe9", b"cafe")]


@pytest.mark.parametrize("file", ["metadata.jsonl", "metadata.csv"])
def test_lists_that_are_no_text(make, file):
    root = make("d/1.png")
    (root / file).write_bytes(lines(("d/1.png", "lost")).encode("utf-16-le"))
    assert captions(root) == ["d"]
    assert opened(root).lost_captions == {UNREADABLE: 1}


def test_half_an_emoji_in_json(make):
    root = make("d/1.png")
    (root / "metadata.jsonl").write_text('{"file_name": "d/1.png", "text": "a \\ud83d"}')
    assert captions(root) == ["d"] and opened(root).lost_captions == {UNREADABLE: 1}
