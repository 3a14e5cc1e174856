"""Tokens that were added to a model, by name: the key `tokens` of sections of text encoders.

It is a list of [name, number of vectors]. In a prompt, the name stands for its vectors, in any
case of letters; a name that begins or ends with a letter or digit must be a word of its own.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm_jax.conditions.pieces import Frame, stack


def added(section: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The field `added` of a section's network, unless there is nothing added."""
    counts = tuple(int(count) for _, count in section.get("tokens") or ())
    return {"added": counts} if counts else {}


def with_tokens(tokenizer: Any, section: dict[str, Any]) -> Any:
    """The tokenizer, which knows the section's `tokens` as well, if there are any."""
    tokens = tuple((str(name), int(count)) for name, count in section.get("tokens") or ())
    return WithTokens(tokenizer, tokens) if tokens else tokenizer


@dataclasses.dataclass(frozen=True)
class WithTokens:
    """A tokenizer with further tokens, (name, number of vectors). Their ids follow its own."""

    inner: Any
    tokens: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        """Number of pieces, without the added tokens."""
        return self.inner.size

    @property
    def max_length(self) -> int:
        return self.inner.max_length

    @property
    def frame(self) -> Frame:
        return self.inner.frame

    @functools.cached_property
    def _ids(self) -> dict[str, list[int]]:
        first, ids = self.size, {}
        for name, count in self.tokens:
            ids[name.lower()] = list(range(first, first + count))
            first += count
        return ids

    @functools.cached_property
    def runs(self) -> dict[int, int]:
        """The number of vectors of each added token by its first id."""
        return {ids[0]: len(ids) for ids in self._ids.values()}

    @functools.cached_property
    def _pattern(self) -> re.Pattern:
        def bounded(name):
            before = r"(?<!\w)" if re.match(r"\w", name) else ""
            return before + re.escape(name) + (r"(?!\w)" if re.search(r"\w$", name) else "")

        names = sorted((name for name, _ in self.tokens), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(bounded, names))})", re.IGNORECASE)

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """As `WordPiece.pieces`; an added token is all of its ids."""
        found = []
        for text in texts:
            parts = self._pattern.split(text)  # names are at odd places
            ids = self.inner.pieces(parts[::2])
            for i, name in enumerate(parts[1::2]):
                ids[i] = [*ids[i], *self._ids[name.lower()]]
            found.append([piece for part in ids for piece in part])
        return found

    def __call__(self, prompts: list[str]) -> np.ndarray:
        """Tokens int32 (B, max_length). What does not fit is cut: see `overflow`."""
        start, end, padding = self.frame
        ids = [[*start, *own, *end] for own in self.pieces(prompts)]
        return stack(ids, self.max_length, padding)

    def overflow(self, prompt: str) -> str:
        """The end of the prompt that does not fit, from its first word on; "" if all does."""
        start, end, _ = self.frame
        room = self.max_length - len(start) - len(end)
        for word in re.finditer(r"\S+", prompt):
            if len(self.pieces([prompt[: word.end()]])[0]) > room:
                return prompt[word.start() :]
        return ""

    def unknown(self, prompt: str) -> list[str]:
        """As that of the tokenizer; an added token is known."""
        return self.inner.unknown(self._pattern.sub(" ", prompt))
