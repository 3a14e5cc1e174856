"""The captions of a folder: a text file beside each picture, and lists of captions.

- beside `picture.jpg`: `picture.txt`, else `picture.caption`;
- `metadata.jsonl`, a line for each picture: `{"file_name": "picture.jpg", "text": "..."}`, or
  "caption" for "text";
- `metadata.csv`, with a first row that names the columns `file_name` and `text`, or `caption`;
  separated by commas, semicolons or tabs.

A list is in the folder of its pictures or in any folder above; the deepest list counts, and in it
the first line for a picture. The name in a line is relative to the list. If no picture has exactly
that name, a picture is used whose name differs only in the direction of slashes, the Unicode form
and the case of letters, provided there is only one.
"""

import csv
import io
import json
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from ldm_jax.data.index import File, Findings
from ldm_jax.data.text_files import is_utf8, printable, read_text

BESIDE = (".txt", ".caption")  # the first wins
LISTS = ("metadata.jsonl", "metadata.csv")  # the first wins
CSV_DELIMITERS = ",;\t"

ABSENT = "no such picture"
AMBIGUOUS = "several pictures of nearly this name"
SECOND = "another caption for the same picture"
UNREADABLE = "text that cannot be read"

Line = tuple[int, str, str]  # its number, file_name, text


class Captions(NamedTuple):
    """Captions by the name of the picture; a message for each lost caption, by reason."""

    texts: dict[str, str]
    lost: dict[str, list[str]]


def texts_beside(pictures: Iterable[str], files: Mapping[str, File]) -> dict[str, File]:
    """The files with the text of one of the pictures."""
    find = make_finder({_stem(name) for name in pictures})
    return {
        name: file
        for name, file in files.items()
        if name.lower().endswith(BESIDE) and find(_stem(name))
    }


def read_beside(file: File) -> tuple[str | None, str]:
    """The text of a file, or None and the reason; for `index.examine`."""
    try:
        return read_text(file.path).strip(), ""
    except ValueError as error:
        return None, str(error).removeprefix(f"{printable(file.path)} ")


def find_captions(
    root: str, pictures: Iterable[str], files: Mapping[str, File], beside: Findings
) -> Captions:
    """The captions of all pictures under the folder `root`.

    Args:
      root: absolute path.
      pictures: their names, relative to `root` with "/".
      files: all files under `root`, by name.
      beside: the findings of `read_beside` in `texts_beside`.

    Raises:
      ValueError: a list is malformed; names file and line.
    """
    pictures = sorted(pictures)
    lost: dict[str, list[str]] = defaultdict(list)
    texts = _from_beside(pictures, files, beside, lost)
    find = make_finder(pictures)
    folders = {posixpath.dirname(n) for n in files if posixpath.basename(n) in LISTS}
    for folder in sorted(folders, key=lambda f: (-len(f.split("/")) * bool(f), f)):
        for picture, text in _from_lists(root, folder, files, find, lost).items():
            texts.setdefault(picture, text)
    return Captions(texts, dict(lost))


def make_finder(names: Iterable[str]) -> Callable[[str], list[str]]:
    """A function that returns those of `names` that a name may refer to: one, none or several."""
    exact = set(names)

    @cache
    def table(form: Callable[[str], str]) -> dict[str, list[str]]:
        by_form = defaultdict(list)
        for name in sorted(exact):
            by_form[form(name)].append(name)
        return dict(by_form)

    def find(name: str) -> list[str]:
        if name in exact:
            return [name]
        name = posixpath.normpath(name.replace("\\", "/"))
        if name in exact:
            return [name]
        for form in (_composed, _folded):
            if form(name) in table(form):
                return table(form)[form(name)]
        return []

    return find


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(_composed(name).casefold())


def _stem(name: str) -> str:
    """The name of a picture or a text without its extension."""
    return name.rpartition(".")[0]


def _from_beside(
    pictures: list[str],
    files: Mapping[str, File],
    beside: Findings,
    lost: dict[str, list[str]],
) -> dict[str, str]:
    """The captions in files beside the pictures."""
    by_stem = defaultdict(list)
    for name in pictures:
        by_stem[_stem(name)].append(name)
    find = make_finder(by_stem)
    texts: dict[str, str] = {}

    def precedence(name: str) -> tuple:
        stem, dot, suffix = name.rpartition(".")
        return stem not in by_stem, BESIDE.index(dot + suffix.lower()), name

    for name in sorted(beside, key=precedence):
        path, finding, found = printable(files[name].path), beside[name], find(_stem(name))
        if finding.fault:
            lost[UNREADABLE].append(f"{path} {finding.fault}")
        elif len(found) > 1:
            lost[AMBIGUOUS].append(f"{path} could belong to any of {_quoted(found)}")
        else:
            for picture in by_stem[found[0]]:
                texts.setdefault(picture, finding.value)
    return texts


def _from_lists(
    root: str,
    folder: str,
    files: Mapping[str, File],
    find: Callable[[str], list[str]],
    lost: dict[str, list[str]],
) -> dict[str, str]:
    """The captions of the lists in one folder."""
    captions: dict[str, str] = {}
    for list_name, read in zip(LISTS, (_json_lines, _csv_rows), strict=True):
        file = files.get(posixpath.join(folder, list_name))
        if file is None:
            continue
        path = printable(file.path)
        try:
            # Only the lines that are not UTF-8 are lost.
            content = read_text(file.path, errors="surrogateescape")
        except OSError as error:
            lost[UNREADABLE].append(f"{path} cannot be read ({error.strerror})")
            continue
        except ValueError as error:
            lost[UNREADABLE].append(str(error))
            continue
        for number, wanted, text in read(path, content):
            line = f"{path}:{number}"
            found = find(_relative(root, folder, wanted))
            if not found:
                lost[ABSENT].append(f"{line} names {printable(wanted)}, which is not there")
            elif len(found) > 1:
                which = f"which could be any of {_quoted(found)}"
                lost[AMBIGUOUS].append(f"{line} names {printable(wanted)}, {which}")
            elif not is_utf8(text):
                lost[UNREADABLE].append(f"{line} is not UTF-8; save the file as UTF-8")
            elif captions.setdefault(found[0], text.strip()) != text.strip():
                lost[SECOND].append(
                    f"{line} names {printable(wanted)} a second time; the first line counts"
                )
    return captions


def _quoted(names: list[str]) -> str:
    return ", ".join(printable(name) for name in names[:3]) + (", …" if len(names) > 3 else "")


def _relative(root: str, folder: str, name: str) -> str:
    """The name of a file relative to `root`, from its name in a list in `folder`."""
    path = posixpath.normpath(posixpath.join(root, folder, name))
    return path.removeprefix(root.rstrip("/") + "/")


def _json_lines(path: str, content: str) -> Iterator[Line]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        yield number, *_checked(path, number, entry, line)


def _csv_rows(path: str, content: str) -> Iterator[Line]:
    first = content.partition("\n")[0]
    delimiter = next(
        (d for d in CSV_DELIMITERS if "file_name" in (c.strip('" \r') for c in first.split(d))), ","
    )
    rows = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    number = 1
    try:
        for row in rows:
            if not header:
                header = [column.strip() for column in row]
                _checked(path, 1, dict.fromkeys(header, ""), first)
            elif any(row):
                line = delimiter.join(row)
                yield number, *_checked(path, number, dict(zip(header, row, strict=False)), line)
            number = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num}: {error}") from error


def _checked(path: str, number: int, entry: Any, line: str) -> tuple[str, str]:
    """(file_name, text) of an entry of a list; raises ValueError for another form."""
    if isinstance(entry, dict):
        name, text = entry.get("file_name"), entry.get("text", entry.get("caption"))
        if isinstance(name, str) and isinstance(text, str):
            return name, text
    if path.endswith(".csv"):
        expected = "the columns file_name and text"
    else:
        expected = '{"file_name": ..., "text": ...}'
    raise ValueError(f"{path}:{number}: expected {expected}, got {line[:80]!r}")
