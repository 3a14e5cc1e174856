"""Pipelines of other kinds than the bundled one, small and with random parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.conditions.requests import inputs_for, negatives_for, other_entries, requests
from ldm_jax.diffusion.plan import Guidance
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pipeline import Pipeline
from tests import tiny_models

PICTURE = np.linspace(0.0, 1.0, 16 * 16 * 3, dtype=np.float32).reshape(16, 16, 3)
MASK = np.zeros((16, 16), bool)
MASK[:, 8:] = True


def pipeline(config):
    return Pipeline(LatentDiffusion.from_config(config), tiny_models.random_params(config), config)


@pytest.fixture(scope="module")
def labelled():
    return pipeline(tiny_models.LABELS)


@pytest.fixture(scope="module")
def xl():
    return pipeline(tiny_models.XL)


@pytest.fixture(scope="module")
def inpainting():
    return pipeline(tiny_models.INPAINTING)


def test_labels_choose_the_picture(labelled):
    noise = np.repeat(labelled.noise(0), 2, axis=0)
    three, four = labelled(labels=[3, 4], steps=2, latents=noise)
    assert three.shape == (16, 16, 3) and np.isfinite([three, four]).all()
    assert np.abs(three - four).max() > 1e-3
    swapped = labelled(labels=[4, 3], steps=2, latents=noise)
    np.testing.assert_allclose(swapped, [four, three], atol=1e-4)
    # Guidance 0 is the null class, whatever the label.
    nothing = labelled(labels=[3, 4], steps=2, latents=noise, guidance=0.0)
    null = labelled(labels=[10, 10], steps=2, latents=noise)
    np.testing.assert_allclose(nothing, null, atol=1e-4)


def test_an_unconditional_model_draws():
    pipe = pipeline(tiny_models.UNCONDITIONAL)
    drawn = pipe(n=3, steps=2)
    assert drawn.shape == (3, 16, 16, 3)
    assert np.abs(drawn[0] - drawn[1]).max() > 0.01
    edited = pipe(image=PICTURE, mask=MASK, steps=2)
    np.testing.assert_array_equal(edited[0][~MASK], PICTURE[~MASK])
    with pytest.raises(ValueError, match="has no condition to be guided by; use guidance=1"):
        pipe(guidance=3.0)
    with pytest.raises(ValueError, match="this model takes no prompt"):
        pipe("a cat")
    with pytest.raises(ValueError, match="0 pictures|n=0: at least one picture"):
        pipe(n=0)


@pytest.mark.parametrize("asked, message", [
    (dict(), "this model needs labels"),
    (dict(prompt="cat", labels=1), "this model takes no prompt"),
    (dict(labels=11), "label 11: this model knows 0 to 10"),
    (dict(labels=[]), "0 prompts, n=1: at least one picture"),
])  # fmt: skip
def test_bad_requests(labelled, asked, message):
    with pytest.raises(ValueError, match=message):
        labelled(**asked)


def test_two_text_encoders_and_sizes_stand_side_by_side(xl):
    """Context: 16 + 16 channels. Vector: pooled, then six numbers of 256 sinusoids."""
    condition = xl.embed(["a cat", "a dog"])
    assert condition.context.shape == (2, 77, 32) and condition.vector.shape == (2, 16 + 6 * 256)
    first, second = (e for e in xl.model.embedders[:2])
    tokens = second.prepare({"caption": ["a cat"]})
    features = second.network.apply({"params": xl.params["text_2"]}, tokens)
    np.testing.assert_allclose(condition.context[:1, :, 16:], features.hidden, atol=1e-5)
    np.testing.assert_allclose(condition.vector[:1, :16], features.pooled, atol=1e-5)
    assert first.tokenizer.padding == "end" and second.tokenizer.padding == "zero"
    # cos(0) of the crop's two zeros
    crop = np.asarray(condition.vector[0, 16 + 512 : 16 + 1024]).reshape(2, 256)
    np.testing.assert_allclose(crop[:, :128], 1.0)


def test_no_negative_prompt_is_zeros_where_the_model_was_trained_so(xl):
    """As diffusers has it: an empty prompt, positive or negative, is encoded like any other."""
    embedders = xl.model.embedders
    (group,) = requests(embedders, ["", "a cat"], None)
    inputs = inputs_for(embedders, group | other_entries(embedders, None, 2, (16, 16)), 2)
    sizes = other_entries(embedders, None, 2, (8, 8))

    def embedded(inputs):
        return [e(xl.params.get(e.name), jnp.asarray(inputs[e.name])) for e in embedders]

    for part in embedded(inputs)[:2]:
        assert (np.abs(part.context).max(axis=(1, 2)) > 0.0).all()
    absent = negatives_for(embedders, inputs, sizes)
    for part in embedded(absent)[:2]:
        assert np.abs(part.context).max() == 0.0
    assert np.abs(embedded(absent)[1].vector).max() == 0.0
    empty = embedded(negatives_for(embedders, inputs, sizes | {"caption": ["", "a cat"]}))
    for part, same in zip(empty[:2], embedded(inputs)[:2], strict=True):
        np.testing.assert_array_equal(part.context, same.context)
    assert absent["sizes"].tolist() == [[8, 8, 0, 0, 8, 8]] * 2


def test_each_picture_has_its_own_negative_prompt(xl):
    noise = np.repeat(xl.noise(0), 2, axis=0)
    asked = dict(steps=2, guidance=5.0)
    both = xl("a cat", ["a dog", "a hat"], n=2, latents=noise, **asked)
    for i, negative in enumerate(["a dog", "a hat"]):
        alone = xl("a cat", negative, latents=noise[:1], **asked)
        np.testing.assert_allclose(both[i], alone[0], atol=1e-4)
    assert np.abs(both[0] - both[1]).max() > 1e-4


def test_sizes_change_the_picture_and_misnamed_ones_are_refused(xl):
    before = xl("a cat", steps=2)
    after = xl("a cat", steps=2, conditions={"crop": (300, 0)})
    assert np.abs(before - after).max() > 1e-4
    away = xl("a cat", steps=2, guidance=Guidance(negative={"crop": (300, 0)}))
    assert min(np.abs(away - before).max(), np.abs(away - after).max()) > 1e-4
    each = xl("a cat", n=2, steps=2, conditions={"crop": [(0, 0), (300, 0)]}, latents=np.repeat(
        xl.noise(0), 2, axis=0))  # fmt: skip
    np.testing.assert_allclose(each, [before[0], after[0]], atol=1e-4)
    with pytest.raises(ValueError, match="takes no 'crops'; it takes original_size, crop, target"):
        xl("a cat", conditions={"crops": (1, 1)})
    with pytest.raises(ValueError, match=r"crop of shape \(3,\): expected 2 numbers, or as many"):
        xl("a cat", conditions={"crop": (1, 1, 1)})


def test_an_inpainting_model_is_told_the_mask_and_what_it_leaves(inpainting):
    embedder = inpainting.model.embedders[1]
    mask = MASK[None, ..., None].astype(np.float32)
    raw = embedder.prepare({"mask": mask, "image": PICTURE[None]})
    told = np.asarray(embedder(inpainting.params["autoencoder"], raw).concat)
    assert told.shape == (1, 8, 8, 5)
    np.testing.assert_array_equal(told[0, :, :, 0], np.repeat([0, 1], 4)[None].repeat(8, 0))
    grey = np.where(MASK[..., None], 0.5, PICTURE)
    np.testing.assert_allclose(told[..., 1:], inpainting.encode(grey), atol=1e-5)
    # uint8 pictures, as in training, give the same.
    bytes_ = np.uint8(np.round(PICTURE * 255))[None]
    same = embedder.prepare({"mask": mask, "image": bytes_})
    np.testing.assert_allclose(same, raw, atol=1 / 255)

    drawn = inpainting("a cat", image=PICTURE, mask=MASK, steps=2)
    np.testing.assert_array_equal(drawn[0][~MASK], PICTURE[~MASK])
    # The pixels under the mask do not matter, those around it do.
    other = np.where(MASK[..., None], 1.0 - PICTURE, PICTURE)
    np.testing.assert_allclose(inpainting("a cat", image=other, mask=MASK, steps=2)[0][MASK],
                               drawn[0][MASK], atol=1e-5)  # fmt: skip
    around = np.where(MASK[..., None], PICTURE, 1.0 - PICTURE)
    changed = inpainting("a cat", image=around, mask=MASK, steps=2)
    assert np.abs(changed - drawn)[0][MASK].max() > 1e-4
    with pytest.raises(ValueError, match="this model inpaints: give it an image and a mask"):
        inpainting("a cat")


def test_a_condition_of_ones_own_reaches_the_network():
    depth = dict(kind="array", output="concat", shape=[None, None, 1], dropout=0.0)
    config = tiny_models.config(tiny_models.STABLE["conditioning"] | {"depth": depth},
                                in_channels=5, context_dim=16)  # fmt: skip
    pipe = pipeline(config)
    maps = np.stack([np.zeros((8, 8, 1)), np.ones((8, 8, 1))])
    noise = np.repeat(pipe.noise(0), 2, axis=0)
    drawn = pipe("a cat", n=2, steps=2, latents=noise, conditions={"depth": maps})
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-4
    with pytest.raises(ValueError, match="this model needs conditions={'depth': an array}"):
        pipe("a cat")
    with pytest.raises(ValueError, match=r"condition 'depth' of shape \(8, 8\): expected"):
        pipe("a cat", conditions={"depth": np.zeros((1, 8, 8))})
    with pytest.raises(ValueError, match="3 of depth for 2 pictures"):
        pipe("a cat", n=2, conditions={"depth": np.zeros((3, 8, 8, 1))})
    with pytest.raises(ValueError, match="a map of 4 × 8 latents for a picture of 8 × 8: it must"):
        pipe("a cat", steps=2, conditions={"depth": np.zeros((1, 4, 8, 1))})


def test_tiles_cut_the_concatenated_condition_too(inpainting):
    picture, mask = np.tile(PICTURE, (1, 2, 1)), np.tile(MASK, (1, 2))
    drawn = inpainting("a cat", image=picture, mask=mask, steps=2, tile=16)
    assert drawn.shape == (1, 16, 32, 3) and np.isfinite(drawn).all()


@pytest.mark.parametrize(
    "kind", ["LABELS", "UNCONDITIONAL", pytest.param("XL", marks=pytest.mark.long)]
)
def test_every_kind_trains(kind):
    """The loss reaches every network that trains."""
    config = getattr(tiny_models, kind)
    model, params = LatentDiffusion.from_config(config), tiny_models.random_params(config)
    batch = {"caption": ["a cat", ""], "label": [3, 4]}
    batch |= other_entries(model.embedders, None, 2, (16, 16))
    inputs = {e.name: e.prepare(batch) for e in model.embedders}
    latents = jax.random.normal(jax.random.key(1), (2, 8, 8, 4))

    @jax.jit
    def gradients(params):
        return jax.grad(lambda p: model.loss(p, latents, inputs, jax.random.key(2)).sum())(params)

    grads = gradients({name: params[name] for name in model.trainable})
    norms = {
        name: np.hypot.reduce([np.linalg.norm(g) for g in jax.tree.leaves(grads[name])])
        for name in model.trainable
    }
    assert all(np.isfinite(norm) and norm > 1e-6 for norm in norms.values()), norms


def test_a_missing_autoencoder_kind_lists_the_known():
    with pytest.raises(ValueError, match="kind='cnn': choose one of kl, vq, tiny"):
        LatentDiffusion.from_config(tiny_models.STABLE | {"autoencoder": {"kind": "cnn"}})


def neighbours(dropout):
    own = dict(kind="array", output="context", shape=[None, 16], dropout=dropout)
    return pipeline(tiny_models.config({"neighbours": own}, context_dim=16))


def test_guidance_leads_away_from_zeros_in_place_of_an_array():
    """As in retrieval-augmented diffusion and unCLIP, which drop theirs in training."""
    pipe, given = neighbours(0.1), np.random.default_rng(0).standard_normal((1, 2, 16))
    asked = dict(steps=2, conditions={"neighbours": given})
    nothing, plain, guided = (pipe(guidance=scale, **asked) for scale in (0.0, 1.0, 3.0))
    null = pipe(steps=2, guidance=1.0, conditions={"neighbours": 0.0 * given})
    np.testing.assert_allclose(nothing, null, atol=1e-4)
    assert np.abs(guided - plain).max() > 1e-4
    with pytest.raises(ValueError, match="has no condition to be guided by"):
        neighbours(0.0)(guidance=3.0, **asked)
