"""Chunks of weighted prompts, and what text encoders make of them."""

import jax
import numpy as np
import pytest

from ldm_jax.conditions.kinds import make_embedders
from ldm_jax.conditions.tokenizer import BytePair, WordPiece
from ldm_jax.conditions.weighted import chunked, emphasised, of_one_length, weighting
from tests import tiny_models

CLIP = BytePair()
START, END = 49406, 49407
WORDS = "one two three four five six seven eight nine ten"  # a piece each


def ids(text):
    return CLIP.pieces([text])[0]


def of(config):
    """(weighted embedders, parameters) of a config."""
    params = tiny_models.random_params(config)
    return weighting(make_embedders(config["conditioning"]), "a1111"), params


@pytest.mark.parametrize("tokenizer", [CLIP, BytePair(padding="zero"), WordPiece("bert", 77)])
def test_a_short_prompt_is_the_plain_one_with_weights(tokenizer):
    tokens, weights = chunked(tokenizer, "a (red:1.5) apple")
    np.testing.assert_array_equal(tokens[0], tokenizer(["a red apple"]))
    assert weights.shape == (1, 1, 77)
    assert weights[0, 0, :6].tolist() == [1, 1, 1.5, 1, 1, 1]
    np.testing.assert_array_equal(chunked(tokenizer, "").tokens[0], tokenizer([""]))


def test_a_long_prompt_fills_several_chunks():
    prompt = " ".join([WORDS] * 16)  # 160 pieces
    (tokens,), (weights,) = chunked(CLIP, f"({prompt}:1.3)")
    assert tokens.shape == (3, 77)
    assert (tokens[:2, 0] == START).all() and (tokens[:2, 76] == END).all()
    said = [*tokens[0, 1:76], *tokens[1, 1:76], *tokens[2, 1:11]]
    assert said == ids(prompt)
    assert tokens[2, 11:].tolist() == [END] * 66
    own = np.float32(1.3)
    assert (weights[:2, 1:76] == own).all() and (weights[2, 1:11] == own).all()
    assert (weights[:, [0, 76]] == 1).all() and (weights[2, 11:] == 1).all()
    exact = " ".join([WORDS] * 7 + ["one two three four five"])  # 75 pieces
    assert len(chunked(CLIP, exact).tokens[0]) == 1
    (tokens,), _ = chunked(BytePair(padding="zero"), prompt)
    assert tokens[2, 11:13].tolist() == [END, 0]


def test_what_follows_a_late_comma_moves_into_the_next_chunk():
    start = " ".join([WORDS] * 6)  # 60 pieces
    (tokens,), _ = chunked(CLIP, f"{start}, {WORDS} {WORDS}")
    assert tokens[0, 1:77].tolist() == [*ids(f"{start},"), *[END] * 15]
    assert tokens[1, 1:22].tolist() == [*ids(f"{WORDS} {WORDS}"), END]
    early = " ".join([WORDS] * 5)  # a comma 25 pieces before the end stays
    (tokens,), _ = chunked(CLIP, f"{early}, {WORDS} {WORDS} {WORDS}")
    assert tokens[0, 76] == END and tokens[0, 75] != END
    # A comma that itself does not fit begins the next chunk.
    (tokens,), _ = chunked(CLIP, " ".join([WORDS] * 7) + " one two three four five, six")
    assert tokens[1, 1:4].tolist() == [*ids(", six"), END]


def test_break_ends_a_chunk():
    (tokens,), (weights,) = chunked(CLIP, "a cat BREAK (a dog:2)")
    assert tokens[0, :4].tolist() == [START, *ids("a cat"), END]
    assert tokens[1, :4].tolist() == [START, *ids("a dog"), END]
    assert weights[1, :4].tolist() == [1, 2, 2, 1]
    assert len(chunked(CLIP, "a cat BREAK").tokens[0]) == 1
    assert len(chunked(CLIP, "BREAK a cat").tokens[0]) == 2


def test_features_are_multiplied_and_keep_their_mean():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((3, 5, 4)).astype(np.float32) + 0.5
    weights = np.ones((3, 5), np.float32)
    weights[0, 2], weights[2] = 1.4, 0.5
    expected = features * weights[..., None]
    expected *= (features.mean((1, 2)) / expected.mean((1, 2)))[:, None, None]
    found = np.asarray(emphasised(features, weights))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(found[1], features[1])
    nothing = np.asarray(emphasised(np.zeros_like(features), weights))
    np.testing.assert_array_equal(nothing, 0.0)


@pytest.mark.parametrize("config", [tiny_models.STABLE, tiny_models.XL], ids=["sd", "xl"])
def test_the_context_is_that_of_each_chunk(config):
    """Every encoder's chunks are joined along the tokens, and the vector is the first one's."""
    embedders, params = of(config)
    for embedder in embedders[: len(config["conditioning"]) - (config is tiny_models.XL)]:
        raw = embedder.prepare({"caption": ["a (red:1.4) cat BREAK a dog", "a tree"]})
        assert raw.tokens.shape == (2, 2, 77)
        own = params[embedder.name]
        made = embedder(own, raw)
        assert made.context.shape == (2, 154, 16)
        inner = embedder.inner
        first = inner.prepare({"caption": ["a red cat", "a dog", "a tree", ""]})
        plain = inner(own, first)
        weights = np.ones((4, 77), np.float32)
        weights[0, 2] = 1.4
        expected = emphasised(plain.context, weights).reshape(2, 154, 16)
        np.testing.assert_allclose(made.context, expected, rtol=1e-5, atol=1e-6)
        assert np.abs(made.context[0, :77] - plain.context[0]).max() > 0.01
        if embedder.name == "text_2":
            np.testing.assert_allclose(made.vector, plain.vector[::2], rtol=1e-5, atol=1e-6)


def test_our_own_transformer_takes_chunks_of_its_length():
    section = dict(kind="text", vocabulary="bert", dropout=0.1)
    section["network"] = dict(width=16, depth=1, heads=2, head_dim=8, max_length=12)
    (embedder,) = weighting(make_embedders({"text": section}), "a1111")
    raw = embedder.prepare({"caption": [f"a ({WORDS}:1.2) a cat"]})
    assert raw.tokens.shape == (1, 2, 12)
    assert raw.tokens[0, :, 0].tolist() == [101, 101] and raw.tokens[0, 0, 11] == 102
    params = embedder.network.init(jax.random.key(0), raw.tokens[0])["params"]
    assert embedder(params, raw).context.shape == (1, 24, 16)


def test_prompts_and_negative_prompts_have_as_many_chunks():
    """More chunks of a prompt are the empty one's; of no prompt, where that is 0, no prompt's."""
    embedders, params = of(tiny_models.XL)
    prompts = {"caption": ["a BREAK b BREAK c"]}
    texts = embedders[:2]
    inputs = {e.name: e.prepare(prompts) for e in texts}
    given = {e.name: e.negative(inputs[e.name], {"caption": ["d"]}) for e in texts}
    nothing = {e.name: e.negative(inputs[e.name], {}) for e in texts}
    first, second, third = of_one_length(texts, [inputs, given, nothing])
    for embedder in texts:
        shapes = {each[embedder.name].tokens.shape for each in (first, second, third)}
        assert shapes == {(1, 3, 77)}
        empty = embedder.inner.tokenizer([""])[0]
        np.testing.assert_array_equal(second[embedder.name].tokens[0, 1:], [empty, empty])
        made = embedder(params[embedder.name], third[embedder.name])
        np.testing.assert_array_equal(made.context, 0.0)
    np.testing.assert_array_equal(first["text"].tokens, embedders[0].prepare(prompts).tokens)


def test_models_without_prompts_and_unknown_syntaxes_are_refused():
    embedders = make_embedders(tiny_models.LABELS["conditioning"])
    with pytest.raises(ValueError, match="prompt_syntax='a1111': this model takes no prompts"):
        weighting(embedders, "a1111")
    assert weighting(embedders, "plain") == embedders
    with pytest.raises(ValueError, match="prompt_syntax='compel': choose one of plain, a1111"):
        weighting(embedders, "compel")
