"""Text files by their byte-order mark, and names that can be printed."""

import codecs
import os

import pytest

from ldm_jax.data.text_files import is_utf8, printable, read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marks(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("Gänse\r\n🌼".encode(encoding))
    assert read_text(tmp_path / "a.txt") == read_text(str(tmp_path / "a.txt")) == "Gänse\r\n🌼"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"ab\xe9", "a.txt is not UTF-8: byte 2 cannot be read; save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b"a", "a.txt is not UTF-16: byte 2 cannot be read"),
        ("ab".encode("utf-16-be"), "a.txt is not text: it holds zero bytes; save it as UTF-8"),
        ("ab".encode("utf-32"), "a.txt is not text"),
    ],
)
def test_faults_name_the_file(tmp_path, content, fault):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=fault):
        read_text(tmp_path / "a.txt")


def test_bytes_can_be_kept(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xe9")
    text = read_text(tmp_path / "a.txt", errors="surrogateescape")
    assert os.fsencode(text) == b"ab\xe9" and not is_utf8(text) and is_utf8("é")


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("a/é.png", "a/é.png"),
        ("a\udce9.png", "a\\xe9.png"),
        ("\ud83d", "\\ud83d"),
        ("a\\b", "a\\b"),
    ],
)
def test_printable(path, shown):
    assert printable(path) == shown
