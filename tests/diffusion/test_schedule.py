"""Schedules and grids against the values of the originals."""

import numpy as np
import pytest

from ldm_jax.diffusion.schedule import make_schedule, sampling_timesteps

# name, start, end, ᾱ[0], ᾱ[499], ᾱ[999] as the original code computes them.
ORIGINALS = [
    ("linear", 1e-4, 0.02, 0.9999, 0.3331877674, 7.334124596e-4),
    ("linear", 0.0015, 0.0195, 0.9985, 0.1158444908, 1.423039752e-4),
    ("linear", 0.0015, 0.0155, 0.9985, 0.1510774233, 6.686651737e-4),
    ("linear", 0.0015, 0.0205, 0.9985, 0.1085759962, 9.691086681e-5),
    ("linear", 0.00085, 0.012, 0.99915, 0.2776696505, 4.660098513e-3),
    ("cosine", 0.0, 0.0, 0.9999587158, 0.4938435904, 2.428766907e-9),
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


def test_unknown_schedule_lists_the_known():
    with pytest.raises(ValueError, match="'quadratic': choose linear, sqrt_linear or cosine"):
        make_schedule("quadratic")


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 333, 501, 999, 1000])
def test_any_count_gives_distinct_descending_timesteps(spacing, steps):
    grid = sampling_timesteps(1000, steps, spacing)
    assert len(grid) == steps
    assert grid[0] <= 999 and grid[-1] >= 0
    # Only "leading" at its fullest has to repeat one: its grid is shifted by one.
    distinct = np.diff(grid) < 0
    assert distinct.all() or (spacing == "leading" and steps == 1000 and distinct[1:].all())


def test_grids_begin_and_end_where_they_say():
    assert sampling_timesteps(1000, 50, "trailing")[[0, -1]].tolist() == [999, 19]
    assert sampling_timesteps(1000, 50, "leading")[[0, -1]].tolist() == [981, 1]
    assert sampling_timesteps(1000, 50, "linspace")[[0, -1]].tolist() == [999, 0]


@pytest.mark.parametrize("steps, count", [(10, 10), (20, 20), (50, 50), (30, 31), (400, 500)])
def test_compat_grid_has_the_originals_counts(steps, count):
    grid = sampling_timesteps(1000, steps, "compat")
    assert len(grid) == count and grid[-1] == 1 and grid[0] == 1 + (count - 1) * (1000 // steps)


@pytest.mark.parametrize("steps", [3, 9, 27, 101, 251, 501])
def test_compat_grid_refuses_what_crashed_the_original(steps):
    with pytest.raises(ValueError, match=f"steps={steps}: LDM's own grid reaches timestep 1000"):
        sampling_timesteps(1000, steps, "compat")


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_counts_outside_the_table_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps={steps}: this model takes 1 to 1000 steps"):
        sampling_timesteps(1000, steps, "trailing")


def test_unknown_spacing_lists_the_known():
    with pytest.raises(ValueError, match="choose trailing, leading, linspace or compat"):
        sampling_timesteps(1000, 10, "karras")
