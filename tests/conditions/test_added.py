"""Tokens that were added to a model: their ids in prompts, and their vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.conditions.added import WithTokens
from ldm_jax.conditions.kinds import make_embedders
from ldm_jax.conditions.tokenizer import BytePair, WordPiece
from ldm_jax.conditions.weighted import chunked
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.tokens import TokenEmbed

CLIP = BytePair()
SIZE = CLIP.size
TOKENS = (("<cat>", 2), ("mine", 1), ("<cat>s", 1))


@pytest.fixture(scope="module")
def tokenizer():
    return WithTokens(CLIP, TOKENS)


def pieces(text):
    return CLIP.pieces([text])[0]


def test_a_name_stands_for_its_vectors(tokenizer):
    assert tokenizer.size == SIZE
    found = tokenizer.pieces(["a <cat> on mine", "<CAT>s", "a<cat>, Mine!", "miner, determine", ""])
    cat, mine, cats = [SIZE, SIZE + 1], [SIZE + 2], [SIZE + 3]
    assert found == [
        [*pieces("a"), *cat, *pieces("on"), *mine],
        cats,
        [*pieces("a"), *cat, *pieces(","), *mine, *pieces("!")],
        pieces("miner, determine"),
        [],
    ]
    tokens = tokenizer(["a mine", "no such"])
    assert tokens[0, :4].tolist() == [SIZE - 2, *pieces("a"), SIZE + 2, SIZE - 1]
    np.testing.assert_array_equal(tokens[1:], CLIP(["no such"]))


def test_what_does_not_fit_and_what_is_unknown():
    tokenizer = WithTokens(WordPiece("scenes", 6), (("<x>", 3),))
    assert tokenizer.overflow("a <x>") == ""
    assert tokenizer.overflow("a <x> red apple") == "red apple"
    assert tokenizer.overflow("a red <x>") == "<x>"
    assert tokenizer.unknown("a <x> red 日") == ["日"]


def test_vectors_of_a_token_stay_in_one_chunk(tokenizer):
    long = " ".join(["one"] * 74)
    (tokens,), (weights,) = chunked(tokenizer, f"{long} (<cat>:1.2)")
    assert tokens.shape == (2, 77) and tokens[0, 75] == SIZE - 1
    assert tokens[1, 1:4].tolist() == [SIZE, SIZE + 1, SIZE - 1]
    assert (weights[1, 1:3] == np.float32(1.2)).all()


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_ids_beyond_the_table_are_rows_of_their_own(dtype):
    layer = TokenEmbed(5, 3, (2, 1), dtype=dtype)
    ids = jnp.arange(9)[None]
    params = layer.init(jax.random.key(0), ids)["params"]
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "embedding": (5, 3),
        "added_0": (2, 3),
        "added_1": (1, 3),
    }
    rows = np.concatenate([params["embedding"], params["added_0"], params["added_1"]])
    found = jax.jit(layer.apply)({"params": params}, ids)[0]
    assert found.dtype == (dtype or jnp.float32)
    np.testing.assert_array_equal(found[:8], rows.astype(found.dtype))
    assert np.isnan(found[8]).all()
    plain = TokenEmbed(5, 3, dtype=dtype).apply({"params": {"embedding": rows[:5]}}, ids[:, :5])
    np.testing.assert_array_equal(plain[0], found[:5])


def test_pooled_features_are_those_at_the_end_and_not_at_an_added_token():
    fields = dict(vocab_size=10, width=8, depth=1, heads=1, max_length=5)
    network = CLIPText(**fields, added=(2,))
    tokens = np.array([[8, 3, 11, 9, 9]])
    params = network.init(jax.random.key(0), tokens)["params"]
    features = network.apply({"params": params}, tokens)
    cut = network.apply({"params": params}, tokens[:, :4])
    np.testing.assert_allclose(features.pooled, cut.pooled, rtol=1e-5)
    np.testing.assert_allclose(features.pooled[0], features.hidden[0, 3], rtol=1e-5)
    with pytest.raises(ValueError, match="token 12, but vocab_size is 12"):
        network.apply({"params": params}, np.array([[8, 12, 9]]))


def test_a_section_with_tokens_makes_the_network_and_the_tokenizer():
    network = dict(width=16, depth=1, heads=2, head_dim=8, max_length=12)
    section = dict(kind="text", vocabulary="scenes", dropout=0.1, tokens=[["<x>", 2]])
    (embedder,) = make_embedders({"text": section | {"network": network}})
    assert embedder.network.added == (2,) and hash(embedder) == hash(embedder)
    size = embedder.tokenizer.size
    assert embedder.network.vocab_size == size == WordPiece("scenes", 12).size
    assert embedder.prepare({"caption": ["<x>"]})[0, 1:3].tolist() == [size, size + 1]
