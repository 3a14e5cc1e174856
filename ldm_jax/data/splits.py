"""The split of a source into training and held-out examples."""

import hashlib

SPLITS = ("train", "held_out", "all")


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the example `name` is held out: a fixed `fraction` of all names, by SHA-256."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def in_split(held_out: bool, split: str) -> bool:
    """Whether an example belongs to `split`, one of "train", "held_out", "all"."""
    return split == "all" or held_out == (split == "held_out")


def check_split(split: str) -> None:
    """Raises ValueError if there is no such split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
