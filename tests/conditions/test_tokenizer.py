"""CLIP's byte pairs against transformers' CLIPTokenizer (see `scripts/write_text_goldens.py`)."""

import gzip
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from ldm_jax.conditions import tokenizer
from ldm_jax.conditions.tokenizer import (
    BytePair,
    FolderTokenizer,
    SentencePiece,
    WordPiece,
    make_tokenizer,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "clip_tokens.json").read_text("utf-8"))
ROWS = {row["prompt"]: row["ids"] for row in GOLDEN["prompts"]}
CLIP, OPEN_CLIP = BytePair(), BytePair(padding="zero")


@pytest.mark.parametrize("prompt", ROWS, ids=lambda prompt: ascii(prompt[:30]))
def test_ids_are_those_of_transformers(prompt):
    ids = ROWS[prompt]
    expected = ids + [49407] * (77 - len(ids))
    tokens = CLIP([prompt])
    assert tokens.dtype == np.int32 and tokens.tolist() == [expected]


def test_many_at_once_and_padding():
    prompts = list(ROWS)
    ends, zeros = CLIP(prompts), OPEN_CLIP(prompts)
    assert ends.shape == zeros.shape == (len(prompts), 77)
    for row, ids in zip(zeros.tolist(), ROWS.values(), strict=True):
        assert row == ids + [0] * (77 - len(ids))
    assert CLIP([]).shape == (0, 77)


def test_open_clip_differs_where_it_repairs_or_unescapes():
    """OpenCLIP's ids are ours too, but for what ftfy, html.unescape and str.lower change."""
    different = {row["prompt"] for row in GOLDEN["prompts"] if "open_clip" in row}
    changed = ("\ufeff", "\u2019", "，", "Σ", "ﬁ", "\x00", "&amp;", "Ã¶", "<|start", "<|START")
    assert len(different) == len(changed)
    assert all(any(sign in prompt for sign in changed) for prompt in different)


def test_vocabulary_is_the_original():
    path = tokenizer.VOCABULARIES / "clip.txt.gz"
    # As in clip-anytorch 2.6.0 and open-clip-torch 3.3.0.
    digest = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert CLIP.size == 49408


@pytest.mark.parametrize(
    "prompt, rest",
    [
        ("cat " * 75, ""),
        ("cat " * 76, "cat "),
        ("  Cat\n" + "CAFÉ, " * 37 + "Ünï  end ", "Ünï  end "),
        ("cat " * 74 + "🙂🦭🙃", "🦭🙃"),  # 1, 4 and 2 tokens, of which the first remains
        ("cat " * 74 + "🦭🙃", "🦭🙃"),  # what remains is no whole character
        ("cat " * 74 + "supercalifragilistic", "califragilistic"),
        ("e\u0301 " * 80, "e\u0301 " * 5),
    ],
)
def test_overflow(prompt, rest):
    assert CLIP.overflow(prompt) == rest


@given(st.text(max_size=60))
def test_any_text(text):
    small = BytePair(max_length=9)
    whole, (row,) = BytePair(max_length=300)([text])[0], small([text])
    rest = small.overflow(text)
    length = 1 + whole.tolist().index(49407)
    assert text.endswith(rest)
    assert bool(rest) == (length > 9)
    assert row[0] == 49406 and row[-1] == 49407
    np.testing.assert_array_equal(row[:8], whole[:8])


@pytest.fixture
def merges(tmp_path):
    """A vocabulary of ones own, 517 pieces."""
    path = tmp_path / "merges.txt"
    path.write_text("#version: 0.2\nc a\nca t</w>\nd o\n")
    return path


def test_a_vocabulary_of_ones_own(merges, tmp_path):
    small = BytePair(str(merges), 8)
    assert small.size == 512 + 3 + 2
    t, g = ord("t") - 33, ord("g") - 33
    assert small(["Cat dog cats"]).tolist() == [
        [515, 513, 514, 256 + g, 512, t, 256 + ord("s") - 33, 516]
    ]
    assert small(["cat"]).tolist() == [[515, 513] + [516] * 6]
    packed = tmp_path / "merges.gz"
    packed.write_bytes(gzip.compress(merges.read_bytes()))
    assert BytePair(str(packed), 8, "zero")(["cat"]).tolist() == [[515, 513, 516] + [0] * 5]


def test_merges_that_clip_does_not_use_are_not_read(merges, monkeypatch):
    monkeypatch.setattr(tokenizer, "MERGES", 2)
    assert BytePair(str(merges), 8).size == 512 + 2 + 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a file of merges: '#version' first"),
        ("c a\nca t</w>\n", "not a file of merges: '#version' first"),
        ("#version: 0.2\nc a t\n", "then two pieces a line"),
        ("#version: 0.2\nc at\n", "no merge makes 'at'"),
    ],
)
def test_bad_merges(merges, text, message):
    merges.write_text(text)
    with pytest.raises(ValueError, match=f"merges.txt: .*{message}"):
        BytePair(str(merges))(["x"])


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="vocabulary 'latin': neither one of clip nor a file"):
        BytePair("latin")(["x"])
    with pytest.raises(ValueError, match="padding='none': choose one of end, zero"):
        BytePair(padding="none")


@pytest.mark.parametrize("text, words", [
    ("a red apple", []),
    ("", []),
    ("Red \U0001f9ad apple, \U0001f643!", ["\U0001f9ad", "\U0001f643"]),
    ("\U0001f9ad\U0001f9ad", ["\U0001f9ad\U0001f9ad"]),
    ("\U0001f9ad \U0001f9ad", ["\U0001f9ad", "\U0001f9ad"]),
    ("\u1263\u120d sea", ["\u1263\u120d"]),  # Amharic
])  # fmt: skip
def test_words_that_bert_cannot_say(text, words):
    assert WordPiece("bert", 24).unknown(text) == words


def test_words_that_a_small_vocabulary_cannot_say():
    assert WordPiece("emoji", 24).unknown("a red apple, Жук") == ["Жук"]
    assert CLIP.unknown("\U0001f9ad \u1263\u120d") == []  # every byte has a piece
    small = WordPiece("bert", 4)
    assert small.unknown("cat cat cat \U0001f9ad") == ["\U0001f9ad"]  # beyond the length, too


def test_a_hundred_thousand_captions_are_looked_through_in_seconds():
    caption, tokenize = "a photograph of an astronaut riding a horse", WordPiece("bert", 24)
    tokenize.unknown(caption)
    start = time.process_time()
    for i in range(2000):
        tokenize.overflow(f"{caption} {i}"), tokenize.unknown(f"{caption} {i}")
    assert time.process_time() - start < 1.2  # 0.10 on one core


def test_takes_a_fraction_of_a_second():
    tokenizer.byte_pair_tokenizer.cache_clear()
    start = time.process_time()
    BytePair()(["x"])
    assert time.process_time() - start < 0.6  # 0.13 on one 2.5 GHz core
    start = time.process_time()
    BytePair(padding="zero")(["x"])
    assert time.process_time() - start < 0.05


@pytest.fixture(scope="module")
def japanese(tmp_path_factory):
    """A small model of sentencepiece, trained here, with rinna's padding."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="an optional extra")
    path = tmp_path_factory.mktemp("sentencepiece") / "spiece.model"
    sentences = ["サラリーマン 油絵", "猫が 座っている", "a red apple", "富士山 の 夕日"] * 20
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=file,
            vocab_size=33,
            user_defined_symbols=["[PAD]"],
            minloglevel=2,
        )
    return path


def test_sentencepiece_is_lower_cased_ended_and_padded(japanese):
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(japanese))
    tokenize = tokenizer.SentencePiece(str(japanese), 24)
    prompts = ["猫の 油絵", "A RED apple", ""]
    for row, prompt in zip(tokenize(prompts).tolist(), prompts, strict=True):
        expected = [*model.encode(prompt.lower()), model.eos_id()]
        assert row == expected + [model.piece_to_id("[PAD]")] * (24 - len(expected))
    assert tokenize.size == 33 and tokenize.overflow("猫の 油絵") == ""
    assert tokenize.unknown("猫の 油絵") == []
    assert tokenize.unknown("猫 \U0001f9ad\U0001f643 RED Ж") == ["\U0001f9ad\U0001f643", "ж"]
    short = tokenizer.SentencePiece(str(japanese), 4)
    assert short(["富士山 の 夕日"])[0, -1] == model.eos_id()
    assert "夕日" in short.overflow("富士山 の 夕日")


def test_a_missing_sentencepiece_model_is_named():
    pytest.importorskip("sentencepiece", reason="an optional extra")
    with pytest.raises(ValueError, match="vocabulary 'nowhere.model': neither one of"):
        tokenizer.SentencePiece("nowhere.model")(["a"])


WORDS = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "a", "red", "apple", "cat", "with", "hat"]


def word_level():
    built = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    built.normalizer, built.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    return built


def unigram():
    built = Tokenizer(models.Unigram([("[PAD]", 0.0), ("[UNK]", 0.0), ("[EOS]", 0.0)] + [
        (piece, -float(i)) for i, piece in enumerate(
            ["\u2581", "\u2581a", "\u2581red", "\u2581apple", "cat", "s", "w", "i", "t", "h"]
        )
    ], unk_id=1))  # fmt: skip
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", 2)]
    )
    return built


@pytest.fixture(scope="module", params=[word_level, unigram, "left"], ids=["words", "unigram", "l"])
def folder(request, tmp_path_factory):
    """A folder as transformers writes it, built here."""
    from transformers import PreTrainedTokenizerFast

    left = request.param == "left"
    path = tmp_path_factory.mktemp("tokenizer")
    sides = dict(padding_side="left", truncation_side="left") if left else {}
    PreTrainedTokenizerFast(
        tokenizer_object=(word_level if left else request.param)(),
        unk_token="[UNK]",
        pad_token="[PAD]",
        **sides,
    ).save_pretrained(path)
    return path


PROMPTS = ["a red apple", "", "A red zebra with a CAT, red red red cats", "\U0001f9ad"]


def test_a_folder_gives_the_ids_of_transformers(folder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    for length in (4, 77):
        expected = theirs(PROMPTS, padding="max_length", truncation=True, max_length=length)
        tokens = FolderTokenizer(str(folder), length)(PROMPTS)
        assert tokens.dtype == np.int32 and tokens.tolist() == expected["input_ids"]
    assert FolderTokenizer(str(folder))([]).shape == (0, 77)
    assert FolderTokenizer(str(folder)).size == len(theirs)


def test_a_folder_says_what_it_cuts_and_does_not_know(folder):
    whole, short = FolderTokenizer(str(folder)), FolderTokenizer(str(folder), 5)
    left = whole._tokenizer.truncation_side == "left"
    words = "Whitespace" in (folder / "tokenizer.json").read_text()
    prompt = "a red apple a red red"
    kept, rest = len(short(["a red apple"])[0]) - (2 if words else 1), whole.overflow(prompt)
    assert rest == "" and kept == (3 if words else 4)
    lost = short.overflow(prompt)
    assert lost.split() == (prompt.split()[:-kept] if left else prompt.split()[kept:])
    assert whole.unknown("a red apple") == []
    seal = whole.unknown("a \U0001f9ad red")
    assert [word.strip() for word in seal] == ["\U0001f9ad"]


def test_folders_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="vocabulary 'nowhere': there is no such folder"):
        FolderTokenizer("nowhere")(["a"])
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=word_level()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="declares no padding token"):
        FolderTokenizer(str(tmp_path))(["a"])
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"{tmp_path}: transformers cannot read this tokenizer"):
        FolderTokenizer(str(tmp_path))(["a"])


@pytest.mark.parametrize("section, expected", [
    (dict(kind="text", vocabulary="bert"), WordPiece("bert", 9)),
    (dict(kind="clip", vocabulary="clip"), BytePair("clip", 9, "end")),
    (dict(kind="clip", vocabulary="clip", padding="zero"), BytePair("clip", 9, "zero")),
    (dict(kind="clip", vocabulary="m", tokenizer="sentencepiece"), SentencePiece("m", 9)),
    (dict(kind="text", vocabulary="d", tokenizer="folder"), FolderTokenizer("d", 9)),
    (dict(kind="clip", vocabulary="d", tokenizer="folder"), FolderTokenizer("d", 9)),
])  # fmt: skip
def test_a_section_chooses_its_tokenizer(section, expected):
    assert make_tokenizer(section, 9) == expected
    with pytest.raises(ValueError, match="tokenizer='words': choose one of word_piece, byte_pair"):
        make_tokenizer(section | dict(tokenizer="words"), 9)


def test_transformers_is_imported_for_a_folder_alone():
    code = "import sys, ldm_jax.conditions.tokenizer as t; t.BytePair()(['x'])"
    code += "; t.WordPiece('bert', 9)(['x'])"
    code += "; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
