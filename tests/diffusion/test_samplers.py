"""DDIM against the original's numbers and against a distribution whose denoiser is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.noise import example_keys
from ldm_jax.diffusion.parameterization import Prediction
from ldm_jax.diffusion.samplers import ddim_coefficients, get_sampler, sample
from ldm_jax.diffusion.schedule import make_schedule, sampling_timesteps

SCHEDULE = make_schedule("linear", 1000, 0.00085, 0.012)
MEAN, STD = 0.7, 0.3


def gaussian_denoiser(schedule):
    """The exact E[x0 | x_t] for x0 ~ N(MEAN, STD²), every element on its own."""
    alpha_table, sigma_table = jnp.asarray(schedule.alpha), jnp.asarray(schedule.sigma)

    def denoise(x, t):
        alpha, sigma = alpha_table[t], sigma_table[t]
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        x0 = MEAN + gain * (x - alpha * MEAN)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoise


def run(steps, eta, noise, spacing="trailing"):
    grid = sampling_timesteps(1000, steps, spacing)
    coefficients = ddim_coefficients(SCHEDULE, grid)
    keys = example_keys(jax.random.key(1), len(noise))
    return sample(get_sampler("ddim"), gaussian_denoiser(SCHEDULE), noise, coefficients, keys, eta)


def test_coefficients_on_the_compat_grid_are_the_originals():
    """Stable Diffusion at 50 steps: ldm-facts' values of CompVis' DDIM."""
    grid = sampling_timesteps(1000, 50, "compat")
    abar = SCHEDULE.alphas_cumprod[grid]
    assert abar[[-1, 0]] == pytest.approx([0.9982960278, 0.0057755001], rel=1e-8)
    coefficients = ddim_coefficients(SCHEDULE, grid, to_clean=False)
    assert coefficients["alpha_next"][-1] ** 2 == pytest.approx(0.99915, rel=1e-12)
    assert coefficients["noise"][[-1, 0]] == pytest.approx([0.02064832, 0.45446327], rel=1e-6)


def test_deterministic_ddim_converges_to_the_exact_map_at_first_order():
    """The probability-flow ODE carries N(0, 1) to N(MEAN, STD²) monotonically: x ↦ MEAN + STD·x.

    At the noisy end x_T has the prior's own mean and variance, not quite (0, 1); the exact map
    starts from there.
    """
    noise = jnp.linspace(-2.0, 2.0, 64).reshape(4, 4, 4, 1)
    alpha, sigma = SCHEDULE.alpha[-1], SCHEDULE.sigma[-1]
    start_std = np.sqrt(alpha**2 * STD**2 + sigma**2)
    exact = MEAN + STD * (noise - alpha * MEAN) / start_std
    errors = [float(jnp.abs(run(steps, 0.0, noise) - exact).max()) for steps in (100, 200, 400)]
    slopes = -np.diff(np.log(errors)) / np.log(2)
    assert (slopes > 0.8).all() and errors[-1] < 0.02, errors  # 0.82, 0.90: rising towards 1


def test_stochastic_ddim_reaches_the_right_mean_and_variance():
    noise = jax.random.normal(jax.random.key(0), (16, 16, 16, 1))
    x = np.asarray(run(1000, 1.0, noise))
    standard_error = STD / np.sqrt(x.size)
    assert abs(x.mean() - MEAN) < 4 * standard_error
    assert abs(x.std() - STD) < 4 * standard_error


def test_an_example_does_not_depend_on_its_batch():
    noise = jax.random.normal(jax.random.key(0), (8, 4, 4, 1))
    full = run(10, 1.0, noise)
    for count in (1, 3):
        np.testing.assert_allclose(run(10, 1.0, noise[:count]), full[:count], atol=1e-6)


def test_one_program_for_every_eta():
    compiled = []

    @jax.jit
    def draw(noise, eta):
        compiled.append(1)
        return run(4, eta, noise)

    noise = jnp.ones((2, 2, 2, 1))
    a, b = draw(noise, 0.0), draw(noise, 0.5)
    assert len(compiled) == 1 and not np.allclose(a, b)


def test_progress_reports_every_step_from_inside_the_program():
    seen = []
    grid = sampling_timesteps(1000, 5, "trailing")
    noise = jnp.ones((1, 2, 2, 1))
    keys = example_keys(jax.random.key(1), 1)
    coefficients = ddim_coefficients(SCHEDULE, grid)
    denoise = gaussian_denoiser(SCHEDULE)
    jax.jit(
        lambda noise: sample(
            get_sampler("ddim"),
            denoise,
            noise,
            coefficients,
            keys,
            progress=lambda i: seen.append(int(i)),
        )
    )(noise)
    jax.effects_barrier()
    assert sorted(seen) == [1, 2, 3, 4, 5]


def test_unknown_sampler_lists_the_known():
    with pytest.raises(ValueError, match="sampler 'euler9': choose one of ddim"):
        get_sampler("euler9")
