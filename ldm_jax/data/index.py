"""The files of a folder and the findings in them, stored by the files' size and date.

Opening each of 100,000 pictures takes minutes on slow storage, listing them takes a second. So the
findings (the size of a picture, the text of a caption) are read once and kept in an index: in a
file, if the caller gives a path, else in memory, for the other splits of the same folder.
"""

import json
import logging
import os
import posixpath
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import PIL
from tqdm import tqdm

from ldm_jax.data.text_files import printable

log = logging.getLogger(__name__)

# A newer Pillow may read what an older one could not.
FORMAT = f"ldm_jax index 1, Pillow {PIL.__version__}"
CHUNK = 64  # number of files that a thread reads at once
NEVER = -1  # not the time of any file: the finding is made again at the next start


class File(NamedTuple):
    """A file of a folder: its path, bytes, and time of last change in ns."""

    path: str
    size: int
    mtime: int


class Finding(NamedTuple):
    """The content of a file of this size and time: `value`, JSON-able, or the reason, `fault`."""

    size: int
    mtime: int
    value: Any
    fault: str


Findings = dict[str, Finding]  # by the file's name: its path relative to the folder, with "/"

_MEMORY: dict[str, dict[str, Findings]] = {}


class Listing(NamedTuple):
    """All files under a folder.

    Attributes:
      files: by name, the path relative to the folder with "/".
      faults: by name, the reason why a file cannot be read, or a folder (its name ends in "/")
        cannot be entered.
      repeated: links to folders that are entered under another name, and that name.
    """

    files: dict[str, File]
    faults: dict[str, str]
    repeated: dict[str, str]


def list_files(root: str) -> Listing:
    """Lists all files under the folder `root`, at any depth, without hidden ones.

    Links are followed. Each real folder is entered once, under its own name if that is within
    `root`, else under the first link to it; so a link to a folder above itself is not followed.
    """
    listing = Listing({}, {}, {})
    entered = {_identity(str(above)): "" for above in Path(root).resolve().parents}
    folders, links = [""], []
    while folders or links:
        if folders:
            prefix = folders.pop()
        else:
            links.sort()
            prefix = links.pop(0)
        try:
            identity = _identity(posixpath.join(root, prefix))
            if identity in entered:
                listing.repeated[prefix] = entered[identity]
                continue
            entered[identity] = prefix
            with os.scandir(posixpath.join(root, prefix)) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            listing.faults[prefix] = f"the folder cannot be read ({error.strerror})"
            continue
        for entry in visible:
            name = prefix + entry.name
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(name + "/")
                elif entry.is_file():
                    status = entry.stat()
                    listing.files[name] = File(entry.path, status.st_size, status.st_mtime_ns)
                else:
                    linked = entry.is_symlink()
                    fault = "a link that leads nowhere" if linked else "not a regular file"
                    listing.faults[name] = fault
            except OSError as error:
                listing.faults[name] = f"the file cannot be read ({error.strerror})"
    return listing


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


@contextmanager
def folder_index(root: str, path: str | Path | None) -> Iterator[dict[str, Findings]]:
    """The index of the folder `root`, to be updated with `examine`.

    Yields the findings by kind; the caller adds missing kinds. At the end, also after an
    interruption, an index that changed is written to `path`, whole or not at all. An index that is
    damaged, or was made by another version, is made again; if it cannot be written, a warning is
    logged.
    """
    if path is None:
        yield _MEMORY.setdefault(root, {})
        return
    index = _load(Path(path))
    before = {kind: dict(findings) for kind, findings in index.items()}
    try:
        yield index
    finally:
        if index != before:
            _save(Path(path), index)


def examine(
    findings: Findings,
    files: Mapping[str, File],
    read: Callable[[File], tuple[Any, str]],
    title: str,
) -> None:
    """Updates the findings of `files`; only new and changed files are read.

    Args:
      findings: changed in place.
      files: by name.
      read: returns (value, "") or (None, reason why the file cannot be used); called in threads. An
        OSError becomes a fault that is not stored, because its cause may be the storage.
      title: of the progress bar, which appears if this takes more than a second.
    """
    for name in findings.keys() - files.keys():
        del findings[name]
    new = [
        name
        for name, file in files.items()
        if name not in findings or findings[name][:2] != (file.size, file.mtime)
    ]

    def look(names: list[str]) -> Findings:
        return {name: _find(files[name], read) for name in names}

    chunks = [new[i : i + CHUNK] for i in range(0, len(new), CHUNK)]
    bar = tqdm(total=len(new), desc=title, unit="file", delay=1, dynamic_ncols=True)
    with bar, ThreadPoolExecutor() as pool:
        for found in pool.map(look, chunks):  # an interruption cancels the rest
            findings.update(found)
            bar.update(len(found))


def _find(file: File, read: Callable[[File], tuple[Any, str]]) -> Finding:
    try:
        return Finding(file.size, file.mtime, *read(file))
    except OSError as error:
        return Finding(file.size, NEVER, None, f"the file cannot be read ({error.strerror})")


def _load(path: Path) -> dict[str, Findings]:
    try:
        content = json.loads(path.read_bytes())
        if content.pop("format") != FORMAT:
            return {}
        return {
            kind: {name: Finding(*finding) for name, finding in findings.items()}
            for kind, findings in content.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the index %s is damaged (%s): making it anew", printable(path), error)
        return {}


def _save(path: Path, index: dict[str, Findings]) -> None:
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"format": FORMAT} | index, separators=(",", ":")))
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        log.warning("the index cannot be written: %s", error)
