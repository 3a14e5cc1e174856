"""Files that appear under their name only when they are whole, and folders that one process writes.

A folder that a command makes over hours has `options.json`, with which it was begun; without it the
folder belongs to something else. Names that start with a dot or end with `.part` do not count.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm_jax.data.text_files import printable

OPTIONS = "options.json"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and locks it against other processes.

    Raises:
      ValueError: another process writes there, or it holds the files of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted(
        name
        for name in os.listdir(folder)
        if not name.startswith(".") and not name.endswith(".part")
    )
    if others and OPTIONS not in others:
        raise ValueError(
            f"--out={printable(folder)} holds other files, such as {printable(others[0])}: choose "
            "a new or empty folder"
        )
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out={printable(folder)}: another process writes there") from None
        yield


def begin(folder: Path, options: dict[str, Any], changed: Mapping[str, str] | None = None) -> None:
    """Stores the options of a new folder; refuses others than those with which it was begun.

    `changed` has, by the name of an option, what a message about another value says in its place.

    Raises:
      ValueError: names the first option that differs.
    """
    path = folder / OPTIONS
    if not path.exists():
        write_whole(path, options)
        return
    there, now = json.loads(path.read_bytes()), json.loads(json.dumps(options))
    for name in now:
        if there.get(name) == now[name]:
            continue
        begun = f"--out={printable(folder)} was begun with"
        if name in (changed or {}):
            raise ValueError(f"{begun} {changed[name]}; choose a new folder")
        raise ValueError(
            f"{begun} --{name}={there.get(name)}, now it is {now[name]}: give the same options to "
            "continue, or choose a new folder"
        )


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """Writes a file of JSON, in one line if it holds lists of `names`."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=None if "names" in content else 1) + "\n")
    publish(part, path)


def publish(part: Path, path: Path) -> None:
    """Gives a file its name, after its content has reached the disk."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
