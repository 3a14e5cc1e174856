"""The keys of a file that do not fit a network."""

import logging
import os
from dataclasses import dataclass

log = logging.getLogger(__name__)
NAMED = 3  # keys that a message names


@dataclass(frozen=True)
class Report:
    """The keys that do not fit: missing in the file, unused (`extra`), or of another shape.

    `misshapen` is text: key, expected shape, found shape.
    """

    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()


def check_report(path: str | os.PathLike, network: str, report: Report) -> None:
    """Logs unused tensors; raises ValueError for keys that are missing or misshapen."""
    lacking = [f"{key} is missing" for key in report.missing] + list(report.misshapen)
    if lacking:
        more = f", and {len(lacking) - NAMED} more" if len(lacking) > NAMED else ""
        raise ValueError(f"{path}: {network} is not whole: {'; '.join(lacking[:NAMED])}{more}")
    if report.extra:
        some = ", ".join(report.extra[:NAMED])
        log.warning("%s: %d tensors are not used, such as %s", path, len(report.extra), some)
