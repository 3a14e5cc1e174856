"""What a user holds: the shipped model, asked for pictures in every allowed and refused way."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax.data.sources import EmojiSource


@pytest.fixture(scope="module")
def pipe():
    return ldm_jax.load()


@pytest.fixture(scope="module")
def four(pipe):
    return pipe(["red apple", "cat face"], n=2, steps=4, seed=7)


def test_pictures_are_float_rgb_in_the_unit_range(four):
    assert four.shape == (4, 64, 64, 3) and four.dtype == np.float32
    assert four.min() >= 0.0 and four.max() <= 1.0 and four.std() > 0.05


def test_a_picture_does_not_depend_on_its_company(pipe, four):
    alone = pipe("red apple", n=1, steps=4, seed=7)
    np.testing.assert_allclose(alone[0], four[0], atol=1e-4)
    assert np.abs(four[0] - four[1]).max() > 0.1


def test_nothing_recompiles_for_prompt_seed_guidance_or_eta(pipe, four):
    before = pipe._generate._cache_size()
    pipe(["tulip", "octopus"], "blue", n=2, steps=4, seed=8, guidance=1.5, eta=0.5)
    assert pipe._generate._cache_size() == before


def test_latents_replace_the_seed(pipe):
    noise = np.asarray(jax.random.normal(jax.random.key(5), (1, 8, 8, 16)))
    a, b = (pipe("cat face", steps=2, seed=seed, latents=noise) for seed in (0, 1))
    np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"latents \(1, 8, 8, 16\): expected \(2, 8, 8, 16\)"):
        pipe("cat face", n=2, steps=2, latents=noise)


def test_guidance_one_is_the_conditional_model_and_ignores_the_negative_prompt(pipe):
    a, b = (pipe("cat face", negative, steps=2, guidance=1.0) for negative in ("", "tulip"))
    np.testing.assert_array_equal(a, b)


def test_other_sizes_are_drawn(pipe):
    assert pipe("rainbow", steps=1, height=32, width=96).shape == (1, 32, 96, 3)


def test_encode_and_decode_come_back(pipe):
    images = np.stack([EmojiSource("held_out")[i]["image"] for i in range(8)])
    latents = pipe.encode(images)
    assert latents.shape == (8, 8, 8, 16)
    assert 0.5 < latents.std() < 2.0
    error = np.mean((pipe.decode(latents) - images / 255.0) ** 2)
    assert -10 * np.log10(error) > 20.0
    np.testing.assert_allclose(pipe.encode(images / 255.0), latents, atol=1e-4)


def test_embed_gives_the_context(pipe):
    context = pipe.embed(["cat face", ""]).context
    assert context.shape == (2, 24, pipe.unet.context_dim)


def test_save_and_load_draw_the_same(pipe, four, tmp_path):
    path = tmp_path / "model.safetensors"
    pipe.save(path)
    again = ldm_jax.load(path)(["red apple", "cat face"], n=2, steps=4, seed=7)
    np.testing.assert_array_equal(again, four)


def test_what_is_cut_from_a_long_prompt_is_said(pipe, caplog):
    with caplog.at_level(logging.WARNING, "ldm_jax"):
        ldm_jax_logger = logging.getLogger("ldm_jax")
        ldm_jax_logger.propagate = True
        pipe("cat " * 30 + "tail", steps=1)
    assert "longer than 24 tokens; cut: 'cat cat cat cat cat cat cat cat tail'" in caplog.text


def test_guidance_without_a_null_condition_is_refused(pipe):
    (text,) = pipe.model.embedders
    undropped = dataclasses.replace(text, dropout=0.0)
    model = dataclasses.replace(pipe.model, embedders=(undropped,))
    other = dataclasses.replace(pipe, model=model)
    with pytest.raises(ValueError, match=r"guidance=3, but .* \(conditioning.text.dropout is 0\)"):
        other("cat face", steps=1, guidance=3.0)
    assert other("cat face", steps=1, guidance=1.0).shape == (1, 64, 64, 3)


@pytest.mark.parametrize("arguments, message", [
    (dict(steps=0), "steps=0: this model takes 1 to 1000 steps"),
    (dict(sampler="magic"), "sampler 'magic': choose one of ddim"),
    (dict(width=50), "width=50: this model draws multiples of 16 pixels"),
    (dict(n=0), "at least one picture"),
])  # fmt: skip
def test_arguments_out_of_range_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe("cat face", **arguments)


def test_dtype_is_checked_and_bfloat16_draws_nearly_the_same(four):
    with pytest.raises(ValueError, match="dtype='float16': choose float32 or bfloat16"):
        ldm_jax.load(dtype="float16")
    half = ldm_jax.load(dtype="bfloat16")(["red apple", "cat face"], n=2, steps=4, seed=7)
    assert np.abs(half - four).mean() < 0.05
