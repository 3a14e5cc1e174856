"""Prompts to tokens: WordPiece over a vocabulary that ships, or the user's own file."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
from tokenizers import BertWordPieceTokenizer

VOCABULARIES = Path(__file__).parent / "data" / "vocabulary"


@dataclasses.dataclass(frozen=True)
class WordPiece:
    """BERT's tokenizer, lower-cased: [CLS] pieces… [SEP], padded with 0 to `max_length`.

    `vocabulary` is "bert" (30,522 pieces; for any English), "emoji" (those that the embedded
    captions use) or the path of a vocab.txt. The package `tokenizers` does the work; importing it
    by way of `transformers` would cost every start of the program another second.
    """

    vocabulary: str
    max_length: int

    @functools.cached_property
    def _tokenizer(self) -> BertWordPieceTokenizer:
        path = VOCABULARIES / f"{self.vocabulary}.txt"
        path = path if path.exists() else Path(self.vocabulary)
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in VOCABULARIES.glob("*.txt")))
            raise ValueError(f"vocabulary {self.vocabulary!r}: neither one of {known} nor a file")
        return BertWordPieceTokenizer(str(path), lowercase=True)

    @property
    def size(self) -> int:
        """Number of pieces."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, prompts: list[str]) -> np.ndarray:
        """Tokens int32 (B, max_length). What does not fit is cut: see `overflow`."""
        tokens = np.zeros((len(prompts), self.max_length), np.int32)
        for row, encoding in zip(tokens, self._tokenizer.encode_batch(prompts), strict=True):
            ids = encoding.ids
            if len(ids) > self.max_length:
                ids = ids[: self.max_length - 1] + ids[-1:]
            row[: len(ids)] = ids
        return tokens

    def overflow(self, prompt: str) -> str:
        """The end of the prompt that does not fit, as the user wrote it; "" if all does."""
        encoding = self._tokenizer.encode(prompt)
        if len(encoding.ids) <= self.max_length:
            return ""
        return prompt[encoding.offsets[self.max_length - 1][0] :]
