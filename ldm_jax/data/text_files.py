"""Text files of users: UTF-8, or the encoding of their byte-order mark."""

import codecs
from pathlib import Path

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(path: Path | str, errors: str = "strict") -> str:
    """The text of a file, without a byte-order mark.

    Args:
      path: of the file.
      errors: "strict", or "surrogateescape", which keeps bytes that are not UTF-8 as surrogates.

    Raises:
      ValueError: it is not text or, without a byte-order mark, not UTF-8; names the file.
    """
    content = Path(path).read_bytes()
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{printable(path)} is not {encoding.removesuffix('-sig').upper()}: byte {error.start} "
            "cannot be read; save it as UTF-8"
        ) from error
    if "\0" in text:  # UTF-16 without a mark, or UTF-32
        raise ValueError(f"{printable(path)} is not text: it holds zero bytes; save it as UTF-8")
    return text


def printable(path: Path | str) -> str:
    """A path as valid UTF-8: other bytes become `\\xe9`."""
    text = str(path)
    if is_utf8(text):
        return text
    try:
        return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # a surrogate that represents no byte
        return text.encode(errors="backslashreplace").decode()


def is_utf8(text: str) -> bool:
    """Whether a text or a name was read without surrogates, and can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
