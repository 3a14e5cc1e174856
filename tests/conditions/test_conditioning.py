"""Prompts to tokens, and conditions dropped at their rate."""

import jax
import numpy as np
import pytest

from ldm_jax.conditions.base import drop_conditions, embed
from ldm_jax.conditions.kinds import make_embedders
from ldm_jax.conditions.tokenizer import WordPiece
from ldm_jax.diffusion.noise import example_keys

SECTION = dict(
    kind="text",
    vocabulary="emoji",
    dropout=0.25,
    network=dict(width=16, depth=1, heads=2, head_dim=8, max_length=12),
)


def test_bert_tokens_are_berts():
    """[CLS] a red apple [SEP], ids of bert-base-uncased."""
    tokens = WordPiece("bert", 8)(["A red apple", ""])
    assert tokens.tolist() == [[101, 1037, 2417, 6207, 102, 0, 0, 0], [101, 102] + [0] * 6]
    assert WordPiece("bert", 8).size == 30522


def test_a_long_prompt_is_cut_before_its_last_token():
    tokenizer = WordPiece("bert", 5)
    assert tokenizer(["red apple red apple cat"])[0].tolist() == [101, 2417, 6207, 2417, 102]
    assert tokenizer.overflow("red apple red apple cat") == "apple cat"
    assert tokenizer.overflow("red apple red") == ""


def test_unknown_vocabulary_lists_the_known():
    with pytest.raises(
        ValueError, match="vocabulary 'latin': neither one of bert, emoji, scenes nor"
    ):
        WordPiece("latin", 8)(["x"])


def test_a_vocabulary_of_ones_own(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"]))
    assert WordPiece(str(path), 4)(["cat dog"]).tolist() == [[2, 5, 1, 3]]


def test_unknown_kind_lists_the_known():
    with pytest.raises(ValueError, match="conditioning.text.kind='smell': choose one of text"):
        make_embedders({"text": SECTION | {"kind": "smell"}})


def test_conditions_are_dropped_at_their_rate_and_become_the_empty_prompt():
    embedders = make_embedders({"text": SECTION})
    tokens = np.repeat(embedders[0].prepare({"caption": ["red apple"]}), 4000, axis=0)
    keys = example_keys(jax.random.key(0), 4000)
    dropped = np.asarray(drop_conditions(embedders, {"text": tokens}, keys)["text"])
    null = embedders[0].null(1)[0]
    is_null = (dropped == null).all(axis=1)
    assert ((dropped == tokens).all(axis=1) ^ is_null).all()
    # 0.25 ± five standard errors
    assert is_null.mean() == pytest.approx(0.25, abs=0.035)
    few = np.asarray(drop_conditions(embedders, {"text": tokens[:9]}, keys[:9])["text"])
    np.testing.assert_array_equal(few, dropped[:9])


def test_embedding_depends_on_the_prompt():
    embedders = make_embedders({"text": SECTION})
    tokens = embedders[0].prepare({"caption": ["cat", "dog"]})
    params = {"text": embedders[0].network.init(jax.random.key(0), tokens)["params"]}
    context = embed(embedders, params, {"text": tokens}).context
    assert context.shape == (2, 12, 16)
    assert float(np.abs(context[0] - context[1]).max()) > 0.1
