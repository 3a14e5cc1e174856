"""Ids of pieces, as all tokenizers put them together."""

from typing import NamedTuple

import numpy as np
from tokenizers import Encoding


class Frame(NamedTuple):
    """The ids around those of a prompt, and the id that fills up the rest."""

    start: tuple[int, ...]
    end: tuple[int, ...]
    padding: int


def stack(sequences: list[list[int]], max_length: int, padding: int) -> np.ndarray:
    """Ids int32 (B, max_length); of a longer list, the first ones and the very last."""
    tokens = np.full((len(sequences), max_length), padding, np.int32)
    for row, ids in zip(tokens, sequences, strict=True):
        if len(ids) > max_length:
            ids = ids[: max_length - 1] + ids[-1:]
        row[: len(ids)] = ids
    return tokens


def cut(prompt: str, encoding: Encoding, max_length: int) -> str:
    """The end of the prompt that `stack` leaves out; "" if nothing is left out."""
    if len(encoding.ids) <= max_length:
        return ""
    return prompt[encoding.offsets[max_length - 1][0] :]


def unsaid(prompt: str, ids: list[int], offsets: list[tuple[int, int]], unknown: int) -> list[str]:
    """The words of the prompt whose id is `unknown`, in order."""
    words = [prompt[slice(*at)] for i, at in zip(ids, offsets, strict=True) if i == unknown]
    return [word for word in words if word]
