"""The levels that samplers visit, against the originals' grids."""

import numpy as np
import pytest

from ldm_jax.diffusion.grids import SPACINGS, sampling_grid
from ldm_jax.diffusion.schedule import make_schedule

TABLE = make_schedule("linear", 1000, 0.00085, 0.012)
FLOW, EDM = make_schedule("flow"), make_schedule("edm")


def sampling_levels(*asked, **more):
    return sampling_grid(*asked, **more).levels


def timesteps(steps, spacing, schedule=TABLE):
    return sampling_levels(schedule, steps, spacing).t[:-1]


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 333, 501, 999, 1000])
def test_any_count_gives_distinct_descending_timesteps(spacing, steps):
    grid = timesteps(steps, spacing)
    assert len(grid) == steps
    assert grid[0] <= 999 and grid[-1] >= 0
    assert (np.diff(grid) < 0).all()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", [TABLE, FLOW, EDM])
def test_levels_go_from_noise_to_clean(schedule, spacing):
    if not isinstance(schedule, SPACINGS[spacing][0]):
        with pytest.raises(ValueError, match=f"spacing '{spacing}': for this schedule choose"):
            sampling_levels(schedule, 8, spacing)
        return
    levels = sampling_levels(schedule, 8, spacing)
    assert (np.diff(levels.ratio) < 0).all()
    clean = levels.alpha[-1] == 1.0 and levels.sigma[-1] == 0.0
    assert clean != (spacing == "dpm")
    if schedule is TABLE and not clean:
        assert levels.alpha[-1] ** 2 == pytest.approx(TABLE.alphas_cumprod[0], rel=1e-12)


def test_grids_begin_and_end_where_they_say():
    assert timesteps(50, "trailing")[[0, -1]].tolist() == [999, 19]
    assert timesteps(50, "leading")[[0, -1]].tolist() == [981, 1]
    assert timesteps(50, "linspace")[[0, -1]].tolist() == [999, 0]
    assert timesteps(4, "trailing", FLOW).tolist() == [1000, 750, 500, 250]
    assert timesteps(4, "lcm").tolist() == [999, 759, 499, 259]
    assert timesteps(4, "turbo").tolist() == [999, 899, 799, 699]
    assert timesteps(3, "dpm").tolist() == [999, 666, 333]


def test_turbo_and_trailing_are_the_original_noise_levels():
    """σ/α of SDXL-Turbo's sub-steps, and of SGM's legacy discretisation (ldm-facts §3.9)."""
    turbo = sampling_levels(TABLE, 4, "turbo").ratio
    np.testing.assert_allclose(turbo, [14.61464, 8.30280, 5.08776, 3.32108, 0.0], rtol=1e-5)
    legacy = sampling_levels(TABLE, 50, "trailing").ratio
    np.testing.assert_allclose(
        legacy[[0, 1, -3, -2]], [14.61464, 12.96632, 0.19630, 0.13445], rtol=1e-4
    )


def test_karras_is_the_original_grid():
    """EDM's 10 steps from 80 to 0.002."""
    levels = sampling_levels(EDM, 10, "karras")
    np.testing.assert_allclose(levels.sigma[:4], [80.0, 42.41519, 21.10868, 9.72320], rtol=1e-6)
    np.testing.assert_allclose(levels.sigma[-3:], [0.0204353, 0.002, 0.0], rtol=1e-5)
    ends = sampling_levels(TABLE, 10, "karras").ratio[[0, -2]]
    np.testing.assert_allclose(ends, [14.6146, 0.0291672], rtol=1e-5)


def test_exponential_is_even_in_log_ratio():
    ratio = sampling_levels(TABLE, 10, "exponential").ratio[:-1]
    np.testing.assert_allclose(np.diff(np.log(ratio)), np.log(ratio[1] / ratio[0]), rtol=1e-9)


def test_quad_is_the_originals_without_repetition():
    expected = [1, 3, 9, 20, 36, 56, 80, 109]
    assert timesteps(20, "quad")[::-1][:8].tolist() == expected
    assert timesteps(20, "quad")[:3].tolist() == [801, 719, 641]
    assert (np.diff(timesteps(50, "quad")) < 0).all()


def test_shift_moves_a_flow_grid_towards_noise():
    shifted = sampling_levels(FLOW, 4, "trailing", shift=3.0)
    np.testing.assert_allclose(shifted.sigma, [1.0, 0.9, 0.75, 0.5, 0.0])


@pytest.mark.parametrize("steps, count", [(10, 10), (20, 20), (50, 50), (30, 31), (400, 500)])
def test_compat_grid_has_the_originals_counts(steps, count):
    grid = timesteps(steps, "compat")
    assert len(grid) == count and grid[-1] == 1 and grid[0] == 1 + (count - 1) * (1000 // steps)


@pytest.mark.parametrize("steps", [3, 9, 27, 101, 251, 501])
def test_compat_grid_refuses_what_crashed_the_original(steps):
    with pytest.raises(ValueError, match=f"steps={steps}: LDM's own grid reaches timestep 1000"):
        timesteps(steps, "compat")


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_counts_outside_the_table_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps={steps}: this model takes 1 to 1000 steps"):
        timesteps(steps, "trailing")


def test_small_grids_have_their_limits():
    with pytest.raises(ValueError, match="steps=51: spacing 'lcm' has 50 timesteps"):
        timesteps(51, "lcm")
    with pytest.raises(ValueError, match="steps=11: spacing 'turbo' has 10 timesteps"):
        timesteps(11, "turbo")


def test_a_spacing_of_noise_needs_signal_everywhere():
    silent = make_schedule("linear", zero_terminal_snr=True)
    with pytest.raises(ValueError, match="needs some signal at the last timestep"):
        sampling_levels(silent, 10, "karras")


def test_unknown_spacing_lists_the_known():
    with pytest.raises(ValueError, match="spacing 'even': for this schedule choose trailing, lin"):
        timesteps(10, "even")
