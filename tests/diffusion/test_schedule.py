"""Schedules against the values of the originals."""

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.schedule import DiscreteSchedule, make_schedule

# name, start, end, ᾱ[0], ᾱ[499], ᾱ[999] as the original code computes them.
ORIGINALS = [
    ("linear", 1e-4, 0.02, 0.9999, 0.3331877674, 7.334124596e-4),
    ("linear", 0.0015, 0.0195, 0.9985, 0.1158444908, 1.423039752e-4),
    ("linear", 0.0015, 0.0155, 0.9985, 0.1510774233, 6.686651737e-4),
    ("linear", 0.0015, 0.0205, 0.9985, 0.1085759962, 9.691086681e-5),
    ("linear", 0.00085, 0.012, 0.99915, 0.2776696505, 4.660098513e-3),
    ("cosine", 0.0, 0.0, 0.9999587158, 0.4938435904, 2.428766907e-9),
    ("squaredcos_cap_v2", 0.0, 0.0, 0.9999587158, 0.4938435904, 2.428766907e-9),
]


@pytest.mark.parametrize("name, start, end, first, middle, last", ORIGINALS)
def test_alphas_cumprod_are_the_originals(name, start, end, first, middle, last):
    schedule = make_schedule(name, 1000, start, end)
    values = schedule.alphas_cumprod[[0, 499, 999]]
    np.testing.assert_allclose(values, [first, middle, last], rtol=1e-8)
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1.0, rtol=1e-15)


def test_sqrt_linear_ends_where_other_libraries_linear_does():
    schedule = make_schedule("sqrt_linear", 1000, 1e-4, 0.02)
    assert schedule.alphas_cumprod[999] == pytest.approx(4.035829765e-5, rel=1e-8)


def test_betas_are_the_originals():
    schedule = make_schedule("linear", 1000, 0.00085, 0.012)
    np.testing.assert_allclose(schedule.betas[[1, 500]], [8.54698655e-4, 4.81495414e-3], rtol=1e-8)
    root = make_schedule("sqrt", 1000, 1e-4, 0.02)
    np.testing.assert_allclose(root.betas[[0, -1]], [0.01, 0.02**0.5], rtol=1e-9)
    np.testing.assert_allclose(make_schedule("cosine").betas[0], 4.128422482e-5, rtol=1e-8)


def test_zero_terminal_snr_keeps_the_start_and_loses_all_signal():
    plain = make_schedule("linear", 1000, 0.00085, 0.012)
    rescaled = make_schedule("linear", 1000, 0.00085, 0.012, zero_terminal_snr=True)
    assert rescaled.alphas_cumprod[-1] == 0.0
    assert rescaled.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0], rel=1e-12)
    assert (np.diff(rescaled.alphas_cumprod) < 0).all()
    with pytest.raises(ValueError, match="zero_terminal_snr is for tables of β; 'flow' has none"):
        make_schedule("flow", zero_terminal_snr=True)


def test_flow_is_a_straight_line_and_edm_has_no_scale():
    t, alpha, sigma = make_schedule("flow").at(np.array([0.0, 250.0, 1000.0]))
    np.testing.assert_allclose(alpha, [1.0, 0.75, 0.0])
    np.testing.assert_allclose(sigma, t / 1000)
    t, alpha, sigma = make_schedule("edm").at(np.array([0.002, 80.0]))
    assert (alpha == 1.0).all() and (sigma == t).all()


@pytest.mark.parametrize("name", ["linear", "cosine", "flow", "edm"])
def test_a_level_is_found_again_by_its_ratio(name):
    schedule = make_schedule(name, sigma_max=80.0) if name == "edm" else make_schedule(name)
    levels = schedule.at(np.array([1.0, 17.0, 70.0]))
    np.testing.assert_allclose(schedule.from_ratio(levels.ratio), levels, rtol=1e-9)
    if isinstance(schedule, DiscreteSchedule):
        between = schedule.at(np.array([17.5]))
        assert 17.4 < schedule.from_ratio(between.ratio).t[0] < 17.6
        np.testing.assert_allclose(between.alpha**2 + between.sigma**2, 1.0, rtol=1e-12)
    nearest = schedule.time_of_ratio(jnp.asarray(levels.ratio, jnp.float32))
    np.testing.assert_allclose(nearest, levels.t, rtol=1e-5)


def test_the_noisiest_ratio_is_the_last_timestep():
    schedule = make_schedule("linear", zero_terminal_snr=True)
    assert schedule.time_of_ratio(jnp.array([1e9]))[0] == 998  # the last has none at all
    plain = make_schedule("linear")
    assert plain.time_of_ratio(jnp.array([1e9, 1e-9])).tolist() == [999, 0]


def test_traced_levels_are_the_host_s():
    for name, t in (("linear", [0, 500, 999]), ("flow", [0.0, 500.0, 1000.0])):
        schedule = make_schedule(name)
        traced, host = schedule.level(jnp.asarray(t)), schedule.at(np.asarray(t))
        np.testing.assert_allclose(traced.alpha, host.alpha, rtol=1e-6)
        np.testing.assert_allclose(traced.sigma, host.sigma, rtol=1e-6)


def test_unknown_schedule_lists_the_known():
    with pytest.raises(
        ValueError, match="'quadratic': choose one of linear, sqrt_linear, sqrt, co"
    ):
        make_schedule("quadratic")
