"""Prompts to tokens: BERT's WordPiece, CLIP's byte pairs, SentencePiece, and any tokenizer folder.

The first three use a bundled vocabulary or the user's own file. They are built on the package
`tokenizers`; importing it through `transformers` would add a second to every start of the program.
`transformers` is imported only for a folder (`FolderTokenizer`).
"""

import dataclasses
import functools
import gzip
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    BertWordPieceTokenizer,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ldm_jax.conditions.added import with_tokens
from ldm_jax.conditions.pieces import Frame, cut, stack, unsaid

VOCABULARIES = Path(__file__).parents[1] / "data" / "vocabulary"
START, END = "<|startoftext|>", "<|endoftext|>"
# The merges of its file that CLIP uses: 49,408 pieces, less 2 × 256 single bytes and these two.
MERGES = 48_894
# Radford et al. 2021, their code: special tokens, contractions, words, digits, other signs.
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)


def find(vocabulary: str, suffix: str) -> Path:
    """File of a bundled vocabulary or the user's file; ValueError if there is neither."""
    path = VOCABULARIES / f"{vocabulary}{suffix}"
    path = path if path.exists() else Path(vocabulary)
    if not path.is_file():
        names = sorted(p.name.removesuffix(suffix) for p in VOCABULARIES.glob(f"*{suffix}"))
        known = ", ".join(names)
        raise ValueError(f"vocabulary {vocabulary!r}: neither one of {known} nor a file")
    return path


@functools.cache
def byte_pair_tokenizer(path: Path) -> Tokenizer:
    """CLIP's tokenizer from a file of merges: a line with the version, then two pieces a line.

    Ids: the 256 bytes as characters, the same at a word's end, the merges in their order, start and
    end. Merges after the 48,894th, which CLIP does not use, are not read.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        lines = list(itertools.islice(file, MERGES + 1))
    merges = [tuple(line.split()) for line in lines[1:]]
    if not lines or "#version" not in lines[0] or any(len(pair) != 2 for pair in merges):
        raise ValueError(f"{path}: not a file of merges: '#version' first, then two pieces a line")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    at_end = [character + "</w>" for character in alphabet]
    pieces = [*alphabet, *at_end, *("".join(pair) for pair in merges), START, END]
    ids = {piece: index for index, piece in enumerate(pieces)}

    missing = next((p for pair in merges for p in pair if p not in ids), None)
    if missing is not None:
        raise ValueError(f"{path}: no merge makes {missing!r}, which another merge takes")
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    bytes_as_characters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_as_characters])
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, ids[END]), (START, ids[START]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def _pieces(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


@dataclasses.dataclass(frozen=True)
class WordPiece:
    """BERT's tokenizer, lower-cased: [CLS] pieces… [SEP], padded with 0 to `max_length`.

    `vocabulary` is "bert" (30,522 pieces; for any English), "emoji" or "scenes" (those in the
    captions of that source) or the path of a vocab.txt.
    """

    vocabulary: str
    max_length: int

    @functools.cached_property
    def _tokenizer(self) -> BertWordPieceTokenizer:
        return BertWordPieceTokenizer(str(find(self.vocabulary, ".txt")), lowercase=True)

    @property
    def size(self) -> int:
        """Number of pieces."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, prompts: list[str]) -> np.ndarray:
        """Tokens int32 (B, max_length). What does not fit is cut: see `overflow`."""
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(prompts)]
        return stack(ids, self.max_length, padding=0)

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text alone, of any length, without those that a prompt has around it."""
        return _pieces(self._tokenizer, texts)

    @property
    def frame(self) -> Frame:
        """What stands around and after the ids of a prompt."""
        start, end = (self._tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
        return Frame((start,), (end,), 0)

    def overflow(self, prompt: str) -> str:
        """The end of the prompt that does not fit, as the user wrote it; "" if all does."""
        return cut(prompt, self._tokenizer.encode(prompt), self.max_length)

    def unknown(self, prompt: str) -> list[str]:
        """The words that become [UNK], as the user wrote them, with repetitions."""
        encoding = self._tokenizer.encode(prompt)
        return unsaid(prompt, encoding.ids, encoding.offsets, self._tokenizer.token_to_id("[UNK]"))


@dataclasses.dataclass(frozen=True)
class BytePair:
    """CLIP's tokenizer (Radford et al. 2021, §2.4): start, pieces… end, padded to `max_length`.

    The ids are those of transformers' CLIPTokenizer. Text is composed (NFC), lower-cased, and split
    into contractions, words, single digits and runs of other signs; white space goes. OpenAI's and
    OpenCLIP's own code first repairs broken encodings (ftfy) and unescapes HTML ("&amp;"): this
    does not.

    `vocabulary` is "clip" (49,408 pieces) or the path of a file of merges in CLIP's format, .txt or
    .gz; n merges give 512 + n + 2 pieces. `padding` is "end" (CLIP, as in SD 1 and SDXL's first
    encoder) or "zero" (OpenCLIP, as in SD 2 and SDXL's second). For the latter two, diffusers
    declares "!" as the padding, and so turns every "!" of a prompt into 0; here, as in OpenCLIP and
    in the training of the models, "!" keeps its own id.

    Raises:
      ValueError: an unknown `padding`; a `vocabulary` that is not found or not in the format.
    """

    vocabulary: str = "clip"
    max_length: int = 77
    padding: str = "end"

    def __post_init__(self):
        if self.padding not in ("end", "zero"):
            raise ValueError(f"padding={self.padding!r}: choose one of end, zero")

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return byte_pair_tokenizer(find(self.vocabulary, ".txt.gz"))

    @property
    def size(self) -> int:
        """Number of pieces. The last is the end token, the one before it the start token."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, prompts: list[str]) -> np.ndarray:
        """Tokens int32 (B, max_length). What does not fit is cut: see `overflow`."""
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(prompts)]
        return stack(ids, self.max_length, self.frame.padding)

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """As `WordPiece.pieces`."""
        return _pieces(self._tokenizer, texts)

    @property
    def frame(self) -> Frame:
        """As `WordPiece.frame`."""
        end = self.size - 1
        return Frame((end - 1,), (end,), end if self.padding == "end" else 0)

    def overflow(self, prompt: str) -> str:
        """The end of the prompt that does not fit, as the user wrote it; "" if all does."""
        return cut(prompt, self._tokenizer.encode(prompt), self.max_length)

    def unknown(self, prompt: str) -> list[str]:
        """None, as every byte has a piece."""
        return []


@dataclasses.dataclass(frozen=True)
class SentencePiece:
    """A model of Google's sentencepiece, as T5's tokenizer reads it: pieces… end, padded.

    rinna's Japanese Stable Diffusion uses it in place of CLIP's. Text is lower-cased. `vocabulary`
    is the path of the .model; the padding is its piece [PAD], else its own padding, else the end.

    Raises:
      ValueError: no such file. ImportError: sentencepiece is not installed.
    """

    vocabulary: str
    max_length: int = 77

    @functools.cached_property
    def _model(self):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ImportError(
                "this model's tokenizer needs sentencepiece: pip install sentencepiece"
            ) from error
        return SentencePieceProcessor(model_file=str(find(self.vocabulary, ".model")))

    @property
    def size(self) -> int:
        """Number of pieces."""
        return self._model.get_piece_size()

    def _ids(self, prompt: str) -> list[int]:
        return [*self._model.encode(prompt.lower()), self._model.eos_id()]

    def __call__(self, prompts: list[str]) -> np.ndarray:
        """Tokens int32 (B, max_length). What does not fit is cut: see `overflow`."""
        ids = [self._ids(prompt) for prompt in prompts]
        return stack(ids, self.max_length, self.frame.padding)

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """As `WordPiece.pieces`."""
        return [self._model.encode(text.lower()) for text in texts]

    @property
    def frame(self) -> Frame:
        """As `WordPiece.frame`."""
        end, unknown = self._model.eos_id(), self._model.unk_id()
        choices = (self._model.piece_to_id("[PAD]"), self._model.pad_id(), end)
        return Frame((), (end,), next(i for i in choices if i >= 0 and i != unknown))

    def overflow(self, prompt: str) -> str:
        """The end of the prompt that does not fit, normalised; "" if all does."""
        ids = self._ids(prompt)
        return "" if len(ids) <= self.max_length else self._model.decode(ids[self.max_length - 1 :])

    def unknown(self, prompt: str) -> list[str]:
        """Runs of letters that become the unknown piece, normalised."""
        ids = self._model.encode(prompt.lower())
        pieces = self._model.encode(prompt.lower(), out_type=str)
        unknown = self._model.unk_id()
        runs = [piece for piece, i in zip(pieces, ids, strict=True) if i == unknown]
        return [run.replace("\u2581", " ").strip() for run in runs]


@dataclasses.dataclass(frozen=True)
class FolderTokenizer:
    """The tokenizer in a folder, of any class that `transformers` reads.

    Ids are those with `padding="max_length", truncation=True`; the folder defines the tokens at
    both ends and the padding. Nothing is downloaded, and no code of the folder runs.

    Raises:
      ValueError: `vocabulary` is no folder that `transformers` can read, or declares no padding.
    """

    vocabulary: str
    max_length: int = 77

    @functools.cached_property
    def _tokenizer(self):
        if not Path(self.vocabulary).is_dir():
            raise ValueError(f"vocabulary {self.vocabulary!r}: there is no such folder")
        # It would warn at every start that PyTorch is missing.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer  # takes two seconds

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.vocabulary, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # of any kind, from a damaged file
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"{self.vocabulary}: transformers cannot read this tokenizer: {reason[0]}"
            ) from error
        if tokenizer.pad_token is None:
            raise ValueError(
                f"{self.vocabulary} declares no padding token, with which prompts are filled up to "
                f"{self.max_length}: name one as pad_token in its tokenizer_config.json"
            )
        return tokenizer

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._tokenizer.get_vocab().values())

    def __call__(self, prompts: list[str]) -> np.ndarray:
        """Tokens int32 (B, max_length). What does not fit is cut: see `overflow`."""
        if not prompts:
            return np.zeros((0, self.max_length), np.int32)
        limits = dict(padding="max_length", truncation=True, max_length=self.max_length)
        return np.array(self._tokenizer(list(prompts), **limits)["input_ids"], np.int32)

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """As `WordPiece.pieces`."""
        options = dict(add_special_tokens=False, verbose=False)
        return [list(self._tokenizer(text, **options)["input_ids"]) for text in texts]

    @property
    def frame(self) -> Frame:
        """As `WordPiece.frame`: what the folder's tokenizer puts around a letter."""
        (alone,), whole = self.pieces(["a"]), list(self._tokenizer("a")["input_ids"])
        places = (i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
        if (at := next(places, None)) is None:
            raise ValueError(f"{self.vocabulary}: its ids of a text depend on what is around it")
        end = tuple(whole[at + len(alone) :])
        return Frame(tuple(whole[:at]), end, self._tokenizer.pad_token_id)

    def overflow(self, prompt: str) -> str:
        """The part of the prompt that does not fit, as the user wrote it; "" if all does.

        Tokenizers that are not of the package `tokenizers` give it in their own spelling.
        """
        tokenizer = self._tokenizer
        limits = dict(truncation=True, max_length=self.max_length, return_overflowing_tokens=True)
        if not tokenizer.is_fast:
            return tokenizer.decode(tokenizer(prompt, **limits).get("overflowing_tokens", []))
        parts = tokenizer(prompt, **limits, return_offsets_mapping=True)["offset_mapping"]
        _, *lost = [[at for at in offsets if at[1] > at[0]] for offsets in parts]
        places = [at for part in lost for at in part]
        if not places:
            return ""
        start, end = min(place[0] for place in places), max(place[1] for place in places)
        return prompt[:end] if tokenizer.truncation_side == "left" else prompt[start:]

    def unknown(self, prompt: str) -> list[str]:
        """The words, or pieces of them, that become the unknown token; none where there is none."""
        tokenizer = self._tokenizer
        unknown = tokenizer.unk_token_id
        if unknown is None:
            return []
        if not tokenizer.is_fast:
            pieces = tokenizer.tokenize(prompt)
            ids = tokenizer.convert_tokens_to_ids(pieces)
            return [piece for piece, i in zip(pieces, ids, strict=True) if i == unknown]
        found = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
        return unsaid(prompt, found["input_ids"], found["offset_mapping"], unknown)


TOKENIZERS = {
    "word_piece": WordPiece,
    "byte_pair": BytePair,
    "sentencepiece": SentencePiece,
    "folder": FolderTokenizer,
}


def make_tokenizer(
    section: dict[str, Any], max_length: int
) -> WordPiece | BytePair | SentencePiece | FolderTokenizer:
    """The tokenizer of a section `conditioning.<name>` of kind "text" or "clip".

    Its key `tokenizer` chooses one of `TOKENIZERS`; by default BERT's for "text", else CLIP's. It
    knows the section's `tokens` as well, see `added`.

    Raises:
      ValueError: an unknown `tokenizer`.
    """
    kind = section.get("tokenizer", "word_piece" if section["kind"] == "text" else "byte_pair")
    if kind not in TOKENIZERS:
        raise ValueError(f"tokenizer={kind!r}: choose one of {', '.join(TOKENIZERS)}")
    padding = {"padding": section.get("padding", "end")} if kind == "byte_pair" else {}
    return with_tokens(TOKENIZERS[kind](section["vocabulary"], max_length, **padding), section)
