"""DeepCache in whole pipelines, small and with random parameters: see `diffusion.cache`.

`parity/test_cache.py` compares it with diffusers' UNet under the authors' rule.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.conditions.base import embed
from ldm_jax.conditions.requests import inputs_for
from ldm_jax.diffusion.cache import refreshed
from ldm_jax.diffusion.plan import Guidance, Sampling, plan
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pipeline import Pipeline
from ldm_jax.programs import generate
from tests import tiny_models

CACHED = Sampling("ddim", cache_interval=3, cache_branch=1)
PICTURE = np.linspace(0.0, 1.0, 16 * 16 * 3, dtype=np.float32).reshape(16, 16, 3)
MASK = np.zeros((16, 16), bool)
MASK[:, 8:] = True


def pipeline(config):
    return Pipeline(LatentDiffusion.from_config(config), tiny_models.random_params(config), config)


@pytest.fixture(scope="module")
def pipe():
    return pipeline(tiny_models.STABLE)


def test_which_steps_run_the_whole_unet():
    assert refreshed(7, 3, 0, None).tolist() == [True, False, False, True, False, False, True]
    assert refreshed(7, 3, 2, None)[2:].tolist() == [True, False, False, True, False]
    # Guidance begins at step 1 and ends at step 5.
    active = np.bool_([0, 1, 1, 1, 1, 0, 0])
    assert refreshed(7, 4, 0, active).tolist() == [True, True, False, False, True, True, False]


@pytest.mark.parametrize(
    "guidance",
    [pytest.param(1.0, marks=pytest.mark.long), Guidance(3.0, interval=(0.3, 0.8))],
)
def test_it_is_the_textbook_loop(pipe, guidance):
    """DDIM written out; features of one step, of each side of guidance, serve the next."""
    model, steps, side = pipe.model, 6, 8
    noise = pipe.noise(3)
    drawn = pipe("a red apple", steps=steps, sampler=CACHED, guidance=guidance, latents=noise)
    run = plan(model.diffusion, steps, CACHED, guidance)
    levels, refresh = run.table["level"], run.table["refresh"]
    entries = [inputs_for(model.embedders, {"caption": [text]}, 1) for text in ("a red apple", "")]
    contexts = [embed(model.embedders, pipe.params, each).context for each in entries]
    params = {"params": pipe.params["unet"]}
    whole = jax.jit(lambda *given: model.unet.apply(params, *given, branch=1))
    outer = jax.jit(lambda *given, deep: model.unet.apply(params, *given, branch=1, deep=deep)[0])
    x, kept, fresh = noise.reshape(1, side, side, -1), {}, 0
    for i in range(steps):
        on = run.guidance is not None and (run.guidance.active is None or run.guidance.active[i])
        outputs, t = [], jnp.full(1, levels.t[i])
        for k, context in enumerate(contexts if on else contexts[:1]):
            if refresh[i]:
                output, kept[k] = whole(x, t, context)
                fresh += 1
            else:
                output = outer(x, t, context, deep=kept[k])
            outputs.append(output)
        scale = run.guidance.scale[i] if on else 1.0
        eps = outputs[-1] + scale * (outputs[0] - outputs[-1]) if on else outputs[0]
        a, s = levels.alpha[i], levels.sigma[i]
        x = run.table["x"][i] * x + run.table["b"][i, 0] * (x - s * eps) / a
    assert fresh == (2 if run.guidance is None else 1 + 2 + 2 + 1)
    np.testing.assert_allclose(drawn, pipe.decode(x), atol=2e-5)
    plain = pipe("a red apple", steps=steps, sampler="ddim", guidance=guidance, latents=noise)
    assert np.abs(plain - drawn).max() > 1e-3


def test_an_interval_of_one_changes_no_bit_and_others_compile_nothing(pipe):
    asked = dict(prompt="a red apple", steps=4, guidance=2.0)
    plain = pipe(**asked, sampler="dpmpp_2m")
    before = generate.jitted._cache_size()
    one = pipe(**asked, sampler=Sampling("dpmpp_2m", cache_interval=1))
    np.testing.assert_array_equal(one, plain)
    assert generate.jitted._cache_size() == before
    drawn = [pipe(**asked, sampler=Sampling("dpmpp_2m", cache_interval=i)) for i in (2, 3, 9)]
    assert generate.jitted._cache_size() == before + 1
    errors = [np.abs(one - plain).mean() for one in drawn]
    assert 0.0 < errors[0] < errors[2]


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", pytest.param("plms", marks=pytest.mark.long)])
def test_where_every_step_is_whole_it_changes_nothing(pipe, monkeypatch, sampler):
    """Multistep samplers, and those that draw noise."""
    monkeypatch.setattr("ldm_jax.diffusion.plan.refreshed", lambda steps, *_: np.ones(steps, bool))
    asked = dict(prompt="a red apple", steps=3, guidance=2.0)
    cached = pipe(**asked, sampler=Sampling(sampler, cache_interval=2))
    np.testing.assert_allclose(cached, pipe(**asked, sampler=sampler), atol=1e-5)


def test_edits_start_with_a_whole_step():
    """One step of an edit is whole, however many are left out before it."""
    pipe = pipeline(tiny_models.INPAINTING)
    asked = dict(prompt="an apple", image=PICTURE, mask=MASK, steps=4, strength=0.25)
    cached = pipe(**asked, sampler=Sampling("ddim", cache_interval=4))
    np.testing.assert_allclose(cached, pipe(**asked, sampler="ddim"), atol=1e-5)
    drawn = pipe(**asked | dict(strength=1.0), sampler=Sampling("ddim", cache_interval=4))
    np.testing.assert_array_equal(drawn[0][~MASK], PICTURE[~MASK])
    assert np.isfinite(drawn).all()


def test_several_prompts_and_a_worse_model(pipe):
    both = pipe(
        ["a cat", "a dog"], steps=3, sampler=CACHED, guidance=Guidance(2.0, weights=(1, 0.5))
    )
    assert both.shape == (1, 16, 16, 3) and np.isfinite(both).all()
    weak = Pipeline(pipe.model, tiny_models.random_params(pipe.config, seed=1), pipe.config)
    led = pipe("a cat", steps=3, sampler=CACHED, guidance=Guidance(2.0, weak=weak))
    alone = pipe("a cat", steps=3, sampler=CACHED, guidance=1.0)
    assert np.abs(led - alone).max() > 1e-3


def test_a_controlnet_runs_up_to_the_branch():
    """With the features of the same step, the outermost levels make what the whole UNet makes."""
    network = dict(
        unet=dict(tiny_models.STABLE["unet"]), hint_in=3, hint_channels=[4, 4], bgr=False
    )
    section = dict(kind="control", dropout=0.0, network=network)
    sections = tiny_models.STABLE["conditioning"] | {"control": section}
    pipe = pipeline(tiny_models.STABLE | {"conditioning": sections})
    entries = {"caption": ["an apple"], "control": PICTURE[None]}
    condition = embed(
        pipe.model.embedders, pipe.params, inputs_for(pipe.model.embedders, entries, 1)
    )
    x, t = jnp.asarray(pipe.noise(0)), jnp.full(1, 500.0)

    @jax.jit
    def outputs(condition):
        output = functools.partial(pipe.model.output, pipe.params, x, t)
        whole, deep = output(condition, branch=1)
        none = output(condition.replace(control={}), branch=1, deep=deep)[0]
        return whole, output(condition, branch=1, deep=deep)[0], none

    whole, outer, none = outputs(condition)
    np.testing.assert_allclose(outer, whole, atol=1e-5)
    assert np.abs(none - whole).max() > 1e-3
    drawn = pipe("an apple", steps=2, sampler=CACHED, conditions={"control": PICTURE})
    assert np.isfinite(drawn).all()


@pytest.mark.parametrize("options, message", [
    (dict(cache_interval=0), "cache_interval=0: must be a whole number from 1 on"),
    (dict(cache_interval=2.5), "cache_interval=2.5: must be a whole number"),
    (dict(cache_interval=None), "cache_interval=None: must be a whole number from 1 on"),
    (dict(cache_interval=2, cache_branch=-1), "cache_branch=-1: must be a whole number from 0 on"),
    (dict(cache_branch=1), "cache_branch is of a cache: set cache_interval to 2 or more"),
    (dict(sampler="heun", cache_interval=2), "sampler 'heun' evaluates the network twice in each"),
])  # fmt: skip
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_what_a_model_has_not_is_refused(pipe):
    with pytest.raises(ValueError, match="cache_branch=4: this UNet has the branches 0…3"):
        pipe("a cat", steps=2, sampler=Sampling(cache_interval=2, cache_branch=4))
    with pytest.raises(ValueError, match=r"cache_interval: a picture in tiles \(tile\) has no"):
        pipe("a cat", steps=2, sampler=CACHED, width=48, tile=16)
