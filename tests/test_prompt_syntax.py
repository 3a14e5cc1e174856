"""Pipelines whose prompts have weights, AND, BREAK, and any length."""

import numpy as np
import pytest

from ldm_jax.diffusion.plan import Guidance
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pipeline import Pipeline
from tests import tiny_models

MODEL = tiny_models.config(
    tiny_models.STABLE["conditioning"], channel_mult=[1], attention_resolutions=[1], context_dim=16
)
LONG = ", ".join(f"thing number {i} of a list" for i in range(20))


def pipeline(config, seed=0):
    params = tiny_models.random_params(config, seed, scale=0.3)
    return Pipeline(LatentDiffusion.from_config(config), params, config)


@pytest.fixture(scope="module")
def plain():
    return pipeline(MODEL)


@pytest.fixture(scope="module")
def pipe(plain):
    return plain.with_prompt_syntax("a1111")


def drawn(pipe, prompt, *negative, **options):
    return pipe(prompt, *negative, **dict(steps=2, seed=3, guidance=3.0) | options)


def test_it_is_off_by_default_and_changes_nothing_of_plain_prompts(plain, pipe):
    assert (plain.prompt_syntax, pipe.prompt_syntax) == ("plain", "a1111")
    assert pipe.with_prompt_syntax("plain").model == plain.model
    for negative in ((), ("a dog",)):
        pictures = drawn(plain, ["a cat", "a tree"], *negative)
        np.testing.assert_allclose(drawn(pipe, ["a cat", "a tree"], *negative), pictures, atol=1e-4)
    weighted = drawn(pipe, ["(a:1.5) cat", "a tree"], "a dog")
    assert np.abs(weighted[0] - pictures[0]).max() > 1e-3
    np.testing.assert_allclose(weighted[1], pictures[1], atol=1e-6)
    assert np.abs(drawn(plain, "(a:1.5) cat", "a dog") - weighted[:1]).max() > 1e-3


def test_long_prompts_are_drawn_and_so_are_their_negatives(plain, pipe):
    long, cut = drawn(pipe, LONG), drawn(plain, LONG)
    assert np.abs(long - cut).max() > 1e-3
    context = np.asarray(pipe.embed(["a BREAK b", "c"]).context)
    chunks = np.asarray(plain.embed(["a", "b", "c", ""]).context)
    np.testing.assert_allclose(context, chunks.reshape(2, 154, -1), rtol=1e-5, atol=1e-6)
    other = drawn(pipe, "a cat", LONG)
    assert np.abs(other - drawn(pipe, "a cat")).max() > 1e-3
    # A picture does not depend on its company, if that is as long.
    both = drawn(pipe, [LONG, LONG.replace("thing", "dog")])
    np.testing.assert_allclose(both[:1], long, atol=1e-4)


def test_and_is_a_composition_with_weights(plain, pipe):
    composed = drawn(plain, ["a cat", "a dog"], guidance=Guidance(3.0, weights=(1.0, 0.5)))
    pictures = drawn(pipe, ["a cat AND a dog :0.5", "a tree"])
    np.testing.assert_allclose(pictures[:1], composed, atol=1e-4)
    alone = drawn(plain, ["a cat", "a tree"])[1:]
    np.testing.assert_allclose(pictures[1:], alone, atol=1e-4)
    half = drawn(plain, "a cat", guidance=Guidance(3.0, weights=(0.5,)))
    np.testing.assert_allclose(drawn(pipe, "a cat :0.5"), half, atol=1e-4)
    batched = drawn(pipe, ["a cat AND a dog :0.5", "a tree"], batch=1)
    np.testing.assert_allclose(batched, pictures, atol=1e-4)


def test_sdxl_takes_weights_and_several_chunks():
    pipe = pipeline(tiny_models.XL).with_prompt_syntax("a1111")
    first = drawn(pipe, "a (red:1.3) cat BREAK a dog", steps=1)
    assert first.shape == (1, 16, 16, 3) and np.isfinite(first).all()
    second = drawn(pipe, "a (red:1.3) cat BREAK a dog", "a tree", steps=1)
    assert np.abs(first - second).max() > 1e-4


def test_a_weak_model_reads_prompts_in_the_same_syntax(pipe):
    weak = pipeline(MODEL, seed=1)
    drawn_with = drawn(pipe, "a (cat:1.2) BREAK a", guidance=Guidance(2.0, weak=weak), steps=1)
    assert np.isfinite(drawn_with).all()
    with pytest.raises(ValueError, match=r"it takes no weights \(compose\)"):
        drawn(pipe, "a AND b", guidance=Guidance(2.0, method="apg"), steps=1)
    with pytest.raises(ValueError, match="the worse model replaces .* it takes no weights"):
        drawn(pipe, "a AND b", guidance=Guidance(2.0, weak=weak), steps=1)


def test_a_model_of_labels_refuses_it():
    with pytest.raises(ValueError, match="this model takes no prompts"):
        pipeline(tiny_models.LABELS).with_prompt_syntax("a1111")
