"""`Pipeline` on the bundled model: all arguments, and the refused values."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax.conditions.requests import label_index, label_name
from ldm_jax.data.scenes import SceneSource
from ldm_jax.data.sources import EmojiSource
from ldm_jax.diffusion.plan import Guidance, Sampling
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pipeline import Pipeline
from ldm_jax.programs import generate
from tests import tiny_models

PICTURE = np.ones((64, 64, 3), np.float32)


@pytest.fixture(scope="module")
def pipe():
    return ldm_jax.load()


@pytest.fixture(scope="module")
def scenes(pipe):
    """Two that the model was not trained on: captions and pictures."""
    source = SceneSource("held_out", 64, pipe.config["data"]["scenes"])
    examples = [source[i] for i in range(2)]
    return [e["caption"] for e in examples], np.stack([e["image"] for e in examples])


@pytest.fixture(scope="module")
def pictures(scenes):
    return scenes[1]


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
    before = generate.jitted._cache_size()
    pipe(["tulip", "octopus"], "blue", n=2, steps=4, seed=8, guidance=1.5,
         sampler=Sampling(eta=0.5))  # fmt: skip
    pipe(["tulip", "octopus"], n=2, steps=4, guidance=Guidance([1.5, 2, 3, 4], rescale=0.5))
    pipe(["tulip", "octopus"], n=2, steps=4, sampler=Sampling(spacing="karras"))
    assert generate.jitted._cache_size() == before


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


def test_strength_goes_from_the_picture_itself_to_a_new_one(pipe, pictures):
    """One program for every strength; 0 is what the autoencoder gives back."""
    prompts = ["rainbow", "cat face"]
    before = generate.jitted._cache_size()
    # Without guidance, which overshoots in a few steps.
    settings = dict(guidance=1.0, steps=4)
    drawn = [pipe(prompts, image=pictures, strength=s, **settings) for s in (0.0, 0.5, 1.0)]
    assert generate.jitted._cache_size() == before + 1
    np.testing.assert_allclose(drawn[0], pipe.decode(pipe.encode(pictures)), atol=1e-4)
    change = [np.abs(d - pictures / 255.0).mean() for d in drawn]
    assert change[0] < change[1] < change[2]
    again = pipe("rainbow", image=pictures[0], strength=0.5, **settings)
    np.testing.assert_allclose(again[0], drawn[1][0], atol=1e-4)


def test_a_mask_keeps_what_it_does_not_cover(pipe, pictures):
    mask = np.zeros((64, 64), bool)
    mask[20:, :30] = True
    drawn = pipe(["rainbow", "cat face"], image=pictures, mask=mask, steps=4)
    before = generate.jitted._cache_size()
    np.testing.assert_array_equal(drawn[:, ~mask], (pictures / np.float32(255.0))[:, ~mask])
    assert np.abs(drawn - pictures / 255.0)[:, mask].mean() > 0.02
    pipe(["tulip", "octopus"], image=pictures, mask=255 * mask[:, ::-1].astype(np.uint8), steps=4)
    assert generate.jitted._cache_size() == before


def test_inversion_finds_noise_that_draws_the_picture_again(pipe, pictures):
    prompts = ["cat face", "rainbow"]
    noise = pipe.invert(pictures, prompts, steps=20)
    assert noise.shape == (2, 8, 8, 16)
    again = pipe(prompts, latents=noise, guidance=1.0, steps=20)
    reconstructed = pipe.decode(pipe.encode(pictures))
    assert np.abs(again - reconstructed).mean() < 0.02
    other = pipe(prompts, latents=noise[::-1], guidance=1.0, steps=20)
    assert np.abs(other - reconstructed).mean() > 0.1


def test_inversion_of_what_the_model_knows_is_unit_noise(pipe, scenes):
    captions, images = scenes
    noise = pipe.invert(images, captions, steps=20)
    assert 0.7 < noise.std() < 1.3


def test_composed_prompts_make_one_picture(pipe):
    prompts, more = ["cat face", "rainbow"], dict(n=2, steps=4)
    both = pipe(prompts, guidance=Guidance(2.0, weights=[1.0, 0.0]), **more)
    alone = pipe("cat face", n=2, steps=4, guidance=2.0)
    np.testing.assert_allclose(both, alone, atol=1e-4)
    mixed = pipe(prompts, guidance=Guidance(2.0, weights=[0.5, 0.5]), **more)
    assert np.abs(mixed - alone).mean() > 0.02


def test_tiles_draw_larger_than_trained(pipe):
    wide = pipe("rainbow", steps=2, height=64, width=144, tile=64)
    assert wide.shape == (1, 64, 144, 3) and np.isfinite(wide).all()
    whole = pipe("rainbow", steps=2, tile=64)
    np.testing.assert_array_equal(whole, pipe("rainbow", steps=2))


def test_a_weak_model_replaces_the_null_condition(pipe):
    """Against itself autoguidance changes nothing, at any scale."""
    plain = pipe("cat face", steps=2, guidance=1.0)

    def led(weak):
        return pipe("cat face", steps=2, guidance=Guidance(3.0, weak=weak))

    np.testing.assert_allclose(led(pipe), plain, atol=1e-3)
    worse = dataclasses.replace(pipe, params=jax.tree.map(lambda v: 0.9 * v, pipe.params))
    assert np.abs(led(worse) - plain).mean() > 0.01
    diffusion = dataclasses.replace(pipe.model.diffusion, parameterization="eps")
    other = dataclasses.replace(pipe.model, diffusion=diffusion)
    with pytest.raises(ValueError, match=r"weak: a model of other latents.*\(16, 'eps', \('text',"):
        led(dataclasses.replace(pipe, model=other))
    with pytest.raises(
        ValueError, match="with weak, .* no negative_prompt, weights, rescale or method"
    ):
        pipe("cat face", "blue", guidance=Guidance(3.0, weak=pipe))


def test_projected_guidance_is_plain_guidance_if_nothing_is_projected(pipe):
    """Also as a run: x0 of the model's own parameterisation, and back."""
    plain = pipe("cat face", steps=2, guidance=3.0)
    apg = Guidance(3.0, method="apg", parallel=1.0)
    np.testing.assert_allclose(pipe("cat face", steps=2, guidance=apg), plain, atol=1e-3)
    before = generate.jitted._cache_size()
    projected = pipe("cat", steps=2, guidance=dataclasses.replace(apg, parallel=0.0, norm=9.0))
    assert generate.jitted._cache_size() == before  # its numbers are traced
    assert np.abs(projected - plain).mean() > 0.01


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
    (dict(width=50), "width=50: this model draws multiples of 8 pixels, such as 48 or 56"),
    (dict(n=0), "at least one picture"),
    (dict(sampler=Sampling(spacing="even")), "spacing 'even': for this schedule choose trailing"),
    (dict(strength=0.5), "mask and strength need an image"),
    (dict(steps=1.5), "steps=1.5: must be a whole number"),
    (dict(steps="3"), "steps='3': must be a whole number"),
    (dict(seed=2**70), "seed=.*: must be a whole number"),
    (dict(batch="2"), "batch='2': must be a whole number"),
    (dict(prompt=[None]), r"prompt=\[None\]: give a text, or a list of them"),
    (dict(conditions=[1]), r"conditions=\[1\]: give a dict of arrays by entry"),
    (dict(image="cat.png"), "image of shape .*: expected an array"),
    (dict(image=np.zeros((0, 0, 3))), "image of shape .*: expected an array"),
    (dict(guidance=Guidance(negative={"crop": (0, 0)})), "cannot lead away from 'crop' here"),
    (dict(image=PICTURE, strength=1.5), "strength=1.5: must lie in 0"),
    (dict(image=PICTURE, mask=np.ones((32, 64))), r"mask of shape \(32, 64\): expected 64×64"),
    (dict(image=PICTURE, mask=np.full((64, 64), 1.5)), "mask values 1.5 … 1.5: expected uint8, or"),
    (dict(image=PICTURE, mask=np.full((64, 64), np.nan)), "mask values nan … nan: expected uint8"),
    (dict(negative_prompt=["a", "b"]), r"negative_prompt=.*: give one text for all pictures, or a"),
    (dict(negative_prompt=3), "negative_prompt=3: give one text for all pictures, or a list of 1"),
    (dict(negative_prompt=[None]), "negative_prompt=.None.: give one text for all pictures"),
    (dict(conditions={"crop": (0, 0)}), "this model takes no 'crop'; it takes none"),
    (dict(height=0), "height=0: this model draws multiples of 8 pixels, such as 8$"),
    (dict(batch=0), "batch=0: at least one picture must be drawn at a time"),
    (dict(image=PICTURE[:50]), "height=50: this model draws multiples of 8 pixels"),
    (dict(image=PICTURE, width=96), "height and width are the image's, 64 and 64"),
    (dict(image=2.0 * PICTURE), "image values 2 … 2: expected uint8, or float in 0 … 1"),
    (dict(image=PICTURE[0]), r"image of shape \(64, 3\): expected \(H, W, C\)"),
    (dict(image=np.stack([PICTURE] * 3)), "3 of image for 1 pictures: give one, or one for each"),
    (dict(guidance=[1.0, 2.0], steps=3), r"guidance of shape \(2,\): one number, or one for 3"),
    (dict(guidance=Guidance(2.0, weights=[1.0, 2.0])), "2 weights of guidance .* for 1 prompts"),
    (dict(tile=20), "tile=20: this model draws multiples of 8 pixels, such as 16 or 24"),
])  # fmt: skip
def test_arguments_out_of_range_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "cat face"} | arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name, make, more", [
    ("guidance", lambda x: x, {}),
    ("guidance", lambda x: [2.0, x], dict(steps=2)),
    ("strength", lambda x: x, dict(image=PICTURE)),
    ("crop", lambda x: (x, 0), {}),
    ("latents", lambda x: np.full((1, 8, 8, 16), x), {}),
    ("depth", lambda x: np.full((1, 8, 8, 1), x), {}),
])  # fmt: skip
def test_numbers_that_are_not_finite_are_refused_by_name(pipe, name, make, more, value):
    given = {name: make(value)}
    if name in ("crop", "depth"):
        given = {"conditions": given}
    with pytest.raises(ValueError, match=f"^{name}={value:g}: must be a finite number$"):
        pipe("cat face", **given, **more)


def test_pictures_and_scales_that_are_not_finite_are_refused(pipe):
    with pytest.raises(ValueError, match="image values nan … nan: expected uint8"):
        pipe("cat face", image=np.where(PICTURE > 0.0, np.nan, PICTURE))
    with pytest.raises(ValueError, match="^scale=nan: must be a finite number"):
        pipe.with_lora("none.safetensors", scale=float("nan"))
    with pytest.raises(ValueError, match="^guidance='strong': must be a number"):
        pipe("cat face", guidance="strong")
    with pytest.raises(ValueError, match="^steps=1.5: must be a whole number"):
        pipe.invert(PICTURE, "cat face", steps=1.5)
    with pytest.raises(ValueError, match="^scales=inf: must be a finite number"):
        pipe.with_scales(float("inf"))


@pytest.mark.parametrize("network, message", [
    ("unet", "step 1 of 3 gave numbers that are not finite: try another sampler or spacing"),
    ("autoencoder", "the last step or the autoencoder gave numbers that are not finite: try dtype"),
])  # fmt: skip
def test_a_picture_that_is_not_finite_is_refused(pipe, network, message):
    broken = jax.tree.map(np.array, pipe.params[network])
    last = broken["time_embed_2" if network == "unet" else "conv_out"]
    last["bias"][0] = np.nan
    broken = dataclasses.replace(pipe, params=pipe.params | {network: broken})
    with pytest.raises(FloatingPointError, match=message):
        broken("cat face", steps=3)


def test_a_batch_changes_no_picture(pipe, pictures):
    """Whatever is given for each picture goes with it into its batch, the last of which is filled
    up, so that one program draws all of them."""
    prompts = ["cat face", "rainbow", "tulip"]
    image = np.concatenate([pictures, pictures[:1, ::-1]])
    mask = np.zeros((3, 64, 64), bool)
    mask[0, 20:], mask[1, :, :30], mask[2, 30:40] = True, True, True
    each = dict(image=image, mask=mask, latents=pipe.noise(5, 3), steps=4, guidance=2.0)
    whole = pipe(prompts, "blue", **each)
    before = generate.jitted._cache_size()
    parts = pipe(prompts, "blue", batch=2, **each)
    assert generate.jitted._cache_size() == before + 1 and parts.shape == whole.shape
    np.testing.assert_allclose(parts, whole, atol=1e-3)
    np.testing.assert_array_equal(pipe(prompts, "blue", batch=3, **each), whole)
    np.testing.assert_array_equal(pipe(prompts, "blue", batch=64, **each), whole)
    one_for_all = pipe("cat face", n=3, batch=2, image=image[0], steps=4, guidance=2.0)
    alone = pipe("cat face", n=3, image=image[0], steps=4, guidance=2.0)
    np.testing.assert_allclose(one_for_all, alone, atol=1e-3)


def test_a_batch_composes_and_reports(pipe):
    steps = []
    asked = dict(guidance=Guidance(weights=[1.0, 0.5]), n=3, steps=2)
    drawn = pipe(["cat face", "rainbow"], batch=2, **asked,
                 progress=lambda done, x0: steps.append((int(done), x0.shape[0])))  # fmt: skip
    whole = pipe(["cat face", "rainbow"], **asked)
    np.testing.assert_allclose(drawn, whole, atol=1e-3)
    assert steps == [(1, 2), (2, 2)] * 2


NAMES = ("tulip", "Rose", "3", "caf\u00e9")


@pytest.mark.parametrize("label, index", [
    (2, 2), (np.int32(1), 1), ("Rose", 1), ("0", 0), ("3", 2), ("cafe\u0301", 3), ("-1", -1),
])  # fmt: skip
def test_classes_have_names_and_numbers(label, index):
    assert label_index(label, NAMES) == index
    assert label_name(label, NAMES) == (NAMES[index] if index >= 0 else "label -1")


@pytest.mark.parametrize("label, classes, message", [
    ("rose", (), "label 'rose': this model has no class names, only numbers"),
    ("rose", NAMES, "no class of that name; did you mean 'Rose'.; its classes are tulip, Rose, 3"),
    ("xyz", NAMES, "no class of that name; its classes are tulip"),
    ("class 7x", [f"class {i}" for i in range(99)], "; did you mean 'class 7[0-9]*' or [^;]*$"),
    ("xyz", [f"class {i}" for i in range(99)], "; it has 99, such as class 0, class 1, class 2$"),
])  # fmt: skip
def test_an_unknown_class_is_refused_with_the_nearest(label, classes, message):
    with pytest.raises(ValueError, match=message):
        label_index(label, classes)


def test_labels_are_drawn_by_name():
    config = tiny_models.LABELS | {"classes": [f"flower {i}" for i in range(10)]}
    model, params = LatentDiffusion.from_config(config), tiny_models.random_params(config)
    pipe = Pipeline(model, params, config)
    named = pipe(labels=["flower 3", 4], steps=2)
    np.testing.assert_array_equal(named, pipe(labels=[3, "4"], steps=2))
    np.testing.assert_array_equal(pipe(labels="flower 3", steps=2), pipe(labels=3, steps=2))
    with pytest.raises(ValueError, match="did you mean 'flower 9' or"):
        pipe(labels="flower9", steps=2)


def test_dtype_is_checked_and_bfloat16_draws_nearly_the_same(four):
    with pytest.raises(ValueError, match="dtype='float16': choose float32 or bfloat16"):
        ldm_jax.load(dtype="float16")
    half = ldm_jax.load(dtype="bfloat16")(["red apple", "cat face"], n=2, steps=4, seed=7)
    assert np.abs(half - four).mean() < 0.05
