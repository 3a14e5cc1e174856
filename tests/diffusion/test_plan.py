"""A caller's options, and the tables that are made from them."""

import dataclasses
import types

import numpy as np
import pytest

from ldm_jax.diffusion.plan import FIRST_ORDER, Guidance, Sampling, flags, from_flags, plan
from ldm_jax.diffusion.process import Diffusion
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.diffusion.schedule import make_schedule

DIFFUSION = Diffusion(make_schedule("linear", 1000, 0.00085, 0.012), "eps")
ZERO_SNR = Diffusion(make_schedule("linear", zero_terminal_snr=True), "v")
WEAK = types.SimpleNamespace(model=None)
FLOW = Diffusion(make_schedule("flow"), "flow")


def scales(guidance, steps=4):
    run = plan(DIFFUSION, steps, "ddim", guidance)  # t = 999, 749, 499, 249
    return None if run.guidance is None else run.guidance.scale.tolist()


def test_guidance_of_every_step():
    assert scales(3.0) == [3.0] * 4
    assert scales([1.0, 2.0, 3.0, 4.0]) == [1.0, 2.0, 3.0, 4.0]
    assert scales(Guidance(3.0, interval=(0.4, 0.8))) == [1.0, 3.0, 3.0, 1.0]
    assert scales(Guidance(3.0, interval=(0.0, 0.1))) is None
    assert scales(1.0) is None


def test_guidance_is_on_everywhere_or_by_step():
    def active(guidance):
        return plan(DIFFUSION, 4, "ddim", guidance).guidance.active

    assert active(3.0) is None  # no choice at run time
    assert active(Guidance(3.0, interval=(0.4, 0.8))).tolist() == [False, True, True, False]
    assert active([3.0, 1.0, 1.0, 3.0]).tolist() == [True, False, False, True]
    assert active(Guidance([3.0, 1.0, 1.0, 3.0], weights=(1.0, 0.5))) is None


def test_short_forms_are_the_long_ones():
    assert Guidance.of(3.0, 7.5) == Guidance(3.0) == Guidance.of(Guidance(3.0), 7.5)
    assert Guidance.of(None, 7.5) == Guidance(7.5) == Guidance.of(Guidance(), 7.5)
    assert Guidance.of(Guidance(rescale=0.7), 7.5) == Guidance(7.5, rescale=0.7)
    assert Sampling.of("heun", {}) == Sampling("heun") == Sampling.of(Sampling("heun"), {})


def test_the_models_own_sampler_is_the_default():
    own = dict(sampler="ddim", eta=0.7, spacing="karras")
    assert Sampling.of(None, own) == Sampling("ddim", eta=0.7)
    assert Sampling.of(Sampling(eta=0.2), own) == Sampling("ddim", eta=0.2)
    assert Sampling.of("dpmpp_2m", own) == Sampling("dpmpp_2m", spacing="karras")
    assert Sampling.of(Sampling("euler", spacing="trailing"), own).spacing == "trailing"
    assert Sampling.of(None, dict(sampler="unipc", eta=0.0)) == Sampling("unipc")
    with pytest.raises(ValueError, match="sampler 'unipc' has no eta"):
        Sampling.of(Sampling(eta=0.5), dict(sampler="unipc"))


def test_options_reach_the_table():
    """Each option of `Sampling` changes the table of a sampler that takes it, and there is a field
    for each option that a sampler takes."""
    fields = {field.name for field in dataclasses.fields(Sampling)}
    assert {option for s in SAMPLERS.values() for option in s.options} <= fields
    asked = dict(eta=0.5, churn=40.0, churn_min=1.0, churn_max=5.0, churn_scale=1.1)
    for name, value in asked.items():
        sampler, more = ("ddim", {}) if name == "eta" else ("euler", {"churn": 40.0})
        more = {} if name == "churn" else more
        before, after = (
            plan(DIFFUSION, 8, Sampling(sampler, **more | option)).table
            for option in ({}, {name: value})
        )
        changed = before.keys() != after.keys() or any(
            not np.array_equal(before[key], after[key])
            for key in ("x", "noise", "churn")
            if key in before
        )
        assert changed, name


def test_shift_is_of_flow_models():
    run = plan(FLOW, 4, Sampling("flow_euler", shift=3.0))
    np.testing.assert_allclose(run.table["level"].sigma, [1.0, 0.9, 0.75, 0.5])
    with pytest.raises(ValueError, match="shift=3: must be above 0, and is for flow models alone"):
        plan(DIFFUSION, 4, Sampling("ddim", shift=3.0))


@pytest.mark.parametrize("make, message", [
    (lambda: Sampling("magic"), "sampler 'magic': choose one of ddim"),
    (lambda: Sampling("dpmpp_2m", eta=0.5), "sampler 'dpmpp_2m' has no eta; its options: none"),
    (lambda: Sampling("heun", eta=0.5), "sampler 'heun' has no eta; its options: churn"),
    (lambda: Sampling("ddim", eta=-1.0), "eta=-1: must not be negative"),
    (lambda: Sampling("euler", churn=np.nan), "churn=nan: must be a finite number"),
    (lambda: Sampling("ddim", eta="much"), "eta='much': must be a number"),
    (lambda: Guidance(3.0, interval=(0.5,)), r"guidance_interval=\(0.5,\): two numbers, low"),
    (lambda: Guidance(3.0, interval=(0.5, 1.5)), "guidance_interval=0.5,1.5: must lie in 0…1"),
    (lambda: Guidance(3.0, interval=(0.8, 0.5)), "guidance_interval=0.8,0.5: must lie in 0…1"),
    (lambda: Guidance(rescale=2.0), "guidance_rescale=2: must lie in 0…1"),
    (lambda: Guidance(threshold=0.0), "threshold=0: must lie above 0 and up to 1"),
    (lambda: Sampling("ddim", eta=[1.0, 2.0]), r"eta=\[1.0, 2.0\]: must be one number"),
    (lambda: Guidance(rescale="0.5"), "guidance_rescale='0.5': must be a number"),
    (lambda: Guidance(3.0, weights=1.0), "compose=1.0: a list of one weight for each prompt"),
    (lambda: Guidance(3.0, weak="runs/early"), "weak='runs/early': must be a pipeline"),
    (lambda: Guidance(3.0, weak=WEAK, rescale=0.5), "weak: the worse model replaces what guidance"),
    (lambda: Guidance(3.0, weak=WEAK, weights=[1.0]), "weak: the worse model replaces what guid"),
    (lambda: plan(ZERO_SNR, 1000, Sampling("ddim", spacing="dpm")), "visit several levels without"),
    (lambda: scales([1.0, 2.0, 3.0]), r"guidance of shape \(3,\): one number, or one for 4 steps"),
])  # fmt: skip
def test_what_is_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_flags_make_what_they_name():
    values = dict(guidance=3.0, guidance_rescale=0.5, compose=(1.0, 2.0), weak=None, seed=3)
    assert from_flags(Guidance, values) == Guidance(3.0, rescale=0.5, weights=(1.0, 2.0))
    assert from_flags(Sampling, dict(sampler=None, eta=0.5)) == Sampling(None, eta=0.5)
    names = [*flags(Guidance), *flags(Sampling)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("sampler, spacing, sigma", [
    ("ddim", "trailing", 1.0), ("euler", "leading", 1.0), ("dpmpp_2m", "linspace", 1.0),
    ("euler", "trailing", DIFFUSION.schedule.sigma[999]),
    ("lms", "linspace", DIFFUSION.schedule.sigma[999]),
])  # fmt: skip
def test_a_run_starts_from_noise_as_diffusers_does(sampler, spacing, sigma):
    run = plan(DIFFUSION, 10, Sampling(sampler, spacing=spacing))
    assert run.start.alpha == 0.0 and run.start.sigma == pytest.approx(sigma, rel=1e-6)


def test_an_edit_starts_from_the_noised_picture():
    run = plan(DIFFUSION, 10, "ddim", strength=0.6)
    level = DIFFUSION.schedule.at(np.array(599))
    assert (run.start.alpha, run.start.sigma) == pytest.approx((level.alpha, level.sigma))


@pytest.mark.parametrize("spacing, steps, count", [("compat", 7, 8), ("quad", 200, 187)])
def test_grids_of_another_length_than_asked_for(spacing, steps, count):
    """CompVis' own: guidance and strength go by the number of steps that there are."""
    run = plan(DIFFUSION, steps, Sampling("ddim", spacing=spacing), Guidance(3.0, rescale=0.5),
               strength=0.5)  # fmt: skip
    assert {len(v) for v in (run.guidance.scale, run.guidance.rescale, run.table["x"])} == {count}
    assert run.table["active"].sum() == count // 2


def test_a_masked_edit_of_full_strength_keeps_no_trace():
    assert plan(DIFFUSION, 10, strength=1.0, masked=True).start.alpha == 0.0
    assert plan(DIFFUSION, 10, strength=1.0).start.alpha > 0.0
    assert plan(DIFFUSION, 10, strength=0.9, masked=True).start.alpha > 0.0


@pytest.mark.parametrize("sampler", FIRST_ORDER)
def test_cfg_plus_plus_goes_on_with_the_unconditional_noise(sampler):
    """Chung et al. 2024, algorithm 2, step by step in float64: x0 guided by λ, ε unconditional.

    Of samplers that draw noise, the part of σ' that is not drawn.
    """
    diffusion = FLOW if sampler == "flow_euler" else DIFFUSION
    run = plan(diffusion, 6, sampler, Guidance(0.6, method="cfg++"))
    table, grid = run.table, diffusion.grid(6, SAMPLERS[sampler].family, None, None)
    drawn = table.get("noise", np.zeros(6))
    ours = theirs = np.random.default_rng(0).normal(size=5) * run.start.sigma
    for i in range(6):
        (alpha, sigma), (alpha_to, sigma_to) = (
            (level.alpha[i], level.sigma[i]) for level in (grid.here, grid.after)
        )

        def x0(x, step=i):
            return np.sin(x) + 0.1 * step, np.cos(2.0 * x)  # of no condition, and of one

        uncond, cond = x0(ours)
        guided = uncond + run.guidance.scale[i] * (cond - uncond)
        ours = table["x"][i] * ours + table["b"][i, 0] * guided
        uncond, cond = x0(theirs)
        noise = (theirs - alpha * uncond) / sigma
        kept = np.sqrt(max(sigma_to**2 - drawn[i] ** 2, 0.0))
        theirs = alpha_to * (uncond + 0.6 * (cond - uncond)) + kept * noise
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert run.guidance.active is None


def test_the_tables_of_methods():
    apg = plan(DIFFUSION, 3, "ddim", Guidance(2.0, method="apg", parallel=0.5, norm=15)).guidance
    assert [v.tolist() for v in apg.projection] == [[0.5] * 3, [15.0] * 3] and apg.kept is None
    zero = plan(FLOW, 3, "flow_euler", Guidance(2.0, method="cfg-zero*", zero_steps=1)).guidance
    assert zero.kept.tolist() == [0.0, 1.0, 1.0] and zero.projection is None
    plain = plan(FLOW, 3, "flow_euler", Guidance(1.0, method="cfg-zero*", zero_steps=1)).guidance
    assert plain.active.tolist() == [True, False, False]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(method="apgg"),
            "guidance_method='apgg': choose one of cfg, cfg\\+\\+, apg, cfg-zero",
        ),
        (dict(parallel=0.5), "apg_parallel is of guidance_method='apg', not 'cfg'"),
        (dict(method="apg", norm=-1.0), "apg_norm=-1: must be not negative"),
        (
            dict(method="cfg-zero*", zero_steps=1.5),
            "zero_steps=1.5: must be whole and not negative",
        ),
        (dict(method="apg", weights=(1, 0.5)), "it takes no weights \\(compose\\) or weak"),
        (dict(scale=7.5, method="cfg++"), "guidance=7.5: of cfg\\+\\+ it must lie in 0…1"),
        (dict(scale=0.5, method="cfg++", interval=(0, 1)), "cfg\\+\\+ guides at every step"),
    ],
)
def test_bad_methods(options, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**options)


def test_methods_that_do_not_fit_the_run():
    with pytest.raises(ValueError, match="cfg\\+\\+ is of samplers of first order: .* ddim"):
        plan(DIFFUSION, 3, "dpmpp_2m", Guidance(0.5, method="cfg++"))
    with pytest.raises(ValueError, match="only the velocity of a flow model may be zero"):
        plan(DIFFUSION, 3, "ddim", Guidance(2.0, method="cfg-zero*", zero_steps=1))
