"""Samples in tar files, as webdataset has them: successive members KEY.jpg, KEY.txt, …"""

import itertools
import os
import tarfile
from collections.abc import Iterator


def groups(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The key of each sample of an open tar, and its members by ending, in lower case, in order.

    Members whose name starts with a dot, and all that are no files, are left out.

    Raises:
      tarfile.TarError, EOFError: the tar is damaged or truncated.
    """
    members = (m for m in tar if m.isfile() and not os.path.basename(m.name).startswith("."))
    for key, group in itertools.groupby(members, key=lambda member: _key(member.name)):
        yield key, {m.name[len(key) + 1 :].lower(): m for m in group}


def _key(name: str) -> str:
    """The name of a member up to the first dot of its last part, as in webdataset."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]
