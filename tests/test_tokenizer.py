"""CLIP's byte pairs against transformers' CLIPTokenizer (see `scripts/write_text_goldens.py`)."""

import gzip
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_jax import tokenizer
from ldm_jax.tokenizer import BytePair

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
    short = tokenizer.SentencePiece(str(japanese), 4)
    assert short(["富士山 の 夕日"])[0, -1] == model.eos_id()
    assert "夕日" in short.overflow("富士山 の 夕日")


def test_a_missing_sentencepiece_model_is_named():
    pytest.importorskip("sentencepiece", reason="an optional extra")
    with pytest.raises(ValueError, match="vocabulary 'nowhere.model': neither one of"):
        tokenizer.SentencePiece("nowhere.model")(["a"])
