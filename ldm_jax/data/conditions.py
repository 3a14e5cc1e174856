"""Conditions of training pictures other than caption and label.

They are chosen in `config.data.conditions`: the name of a section is the entry of the batch that it
makes (`depth`, `low_resolution`, …), its `kind` one of CONDITIONS, by default the name itself. The
kinds are in `data/condition_kinds.py`. Where the source itself knows what a kind reads (KNOWN), it
takes that instead of a file.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ldm_jax.data.condition_kinds import CONDITIONS, Condition, beside

# Entries that every source provides.
OF_EVERY_SOURCE = ("image", "caption", "label")
# Kinds of condition that a source without files has entries for.
KNOWN = {"scenes": ("segmentation", "boxes")}


def make_conditions(config: Mapping[str, Mapping[str, Any]]) -> tuple[Condition, ...]:
    """The conditions of `config.data.conditions`.

    Raises:
      ValueError: an unknown kind, or a parameter that the kind does not have.
    """
    made = []
    for name, section in config.items():
        fields = dict(section)
        kind = fields.pop("kind", name)
        if kind not in CONDITIONS:
            raise ValueError(
                f"data.conditions.{name}: kind {kind!r} is none of {', '.join(CONDITIONS)}"
            )
        known = {field.name for field in dataclasses.fields(CONDITIONS[kind])} - {"name"}
        unknown = fields.keys() - known
        if unknown:
            raise ValueError(
                f"data.conditions.{name}: no parameter {sorted(unknown)[0]!r}; {kind} has "
                f"{', '.join(sorted(known)) or 'none'}"
            )
        made.append(CONDITIONS[kind](name, **fields))
    return tuple(made)


def check_conditions(
    conditions: Sequence[Condition], needs: Mapping[str, Sequence[str]], source: str
) -> None:
    """Checks, before anything is read, that every entry that a model needs is made.

    Args:
      needs: the entries that each section of `config.conditioning` needs.
      source: `config.data.source`.

    Raises:
      ValueError: names the condition, the missing entry, and how to provide it.
    """
    given = {entry for condition in conditions for entry in condition.entries}
    for name, entries in needs.items():
        for entry in entries:
            if entry not in given and entry not in OF_EVERY_SOURCE:
                kind = entry if entry in CONDITIONS else "array"
                raise ValueError(
                    f"conditioning.{name} needs the entry {entry!r} of each picture, and nothing "
                    f"makes it: add data.conditions.{entry} = dict(kind={kind!r}) to the config; "
                    "ldm_jax/data/condition_kinds.py says what each kind reads"
                )
    for condition in conditions:
        if condition.suffix and source != "folder" and not _known(condition, source):
            raise ValueError(
                f"data.conditions.{condition.name} reads picture.{condition.suffix} beside each "
                f"picture, and data.source={source!r} has no files: use data.source='folder'"
            )


def _known(condition: Condition, source: str) -> bool:
    return any(isinstance(condition, CONDITIONS[kind]) for kind in KNOWN.get(source, ()))


def check_files(conditions: Sequence[Condition], source: Any) -> None:
    """Checks, before training, that the conditions' files beside a folder's pictures exist.

    Raises:
      FileNotFoundError: counts the missing files, and names the first.
    """
    for condition in conditions:
        if not condition.suffix or not len(source):
            continue
        described = source.describe(0)
        if "path" not in described or condition.instead in described:
            continue  # the source itself knows
        paths = [beside(source.describe(i), condition) for i in range(len(source))]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"data.conditions.{condition.name}: {len(missing)} of {len(paths)} pictures have "
                f"no file .{condition.suffix} beside them, such as {missing[0]}"
            )
