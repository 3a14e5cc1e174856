"""Every sampler against distributions whose denoiser, and whose exact path, are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ldm_jax.diffusion.grids import Grid, sampling_grid
from ldm_jax.diffusion.noise import example_keys
from ldm_jax.diffusion.parameterization import Prediction
from ldm_jax.diffusion.samplers import DDIM_INVERSE, SAMPLERS, get_sampler, make_table, sample
from ldm_jax.diffusion.schedule import make_schedule
from tests.diffusion.closed_form import MEAN, STD, as_network, exact_map, mixture

SCHEDULE = make_schedule("linear", 1000, 0.00085, 0.012)
SCHEDULES = {
    "discrete": SCHEDULE,
    "no signal": make_schedule("linear", 1000, 0.00085, 0.012, zero_terminal_snr=True),
    "flow": make_schedule("flow"),
    "edm": make_schedule("edm"),
}
NEED_SIGNAL = ("plms", "heun", "lms")
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde")
# Order of the deterministic ones, with the share of it that 20 … 160 steps must show.
ORDERS = {
    "ddim": 1,
    "euler": 1,
    "flow_euler": 1,
    "heun": 2,
    "flow_heun": 2,
    "plms": 2,
    "lms": 2,
    "dpmpp_2m": 2,
    "unipc": 2,
    "dpmpp_2m_sde": 2,
    "dpmpp_3m_sde": 2,
    "dpmpp_2s_ancestral": 2,
}


def draw(name, x, grid, denoise=mixture, schedule=SCHEDULE, skip=None, key=1, **options):
    table = make_table(name, schedule, grid, skip, **options)
    keys = example_keys(jax.random.key(key), len(x))

    def of_level(x, level, span=None):
        del span  # a MeanFlow sampler's; its own tests are in test_mean_flow.py
        return denoise(x, level)

    @jax.jit
    def run(x, table):
        start = jax.tree.map(lambda v: v[0], table["level"])
        x = x * jnp.sqrt(start.alpha**2 + start.sigma**2)
        return sample(get_sampler(name), of_level, x, table, keys)

    return run(x, table)


def spacing(schedule):
    return "karras" if schedule is SCHEDULES["edm"] else "trailing"


def even_in_log_ratio(steps, high=8.0, low=0.08):
    return Grid.chain(SCHEDULE.from_ratio(np.geomspace(high, low, steps + 1)))


@pytest.mark.parametrize("name", ORDERS)
def test_converges_to_the_exact_path_at_its_order(name):
    """Error against the exact solution at a fixed end, where only the number of steps changes."""
    with jax.enable_x64(True):
        x = jnp.linspace(-2.0, 2.0, 33).reshape(1, 33, 1, 1)
        counts, errors = (20, 40, 80, 160), []
        for steps in counts:
            grid = even_in_log_ratio(steps)
            options = {"eta": 0.0} if "eta" in SAMPLERS[name].options else {}
            end = draw(name, x, grid, **options)
            ends = np.stack(grid.levels[1:], axis=1)[[0, -1]]
            errors.append(np.abs(end - exact_map(np.asarray(x), *ends)).max())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope >= 0.9 * ORDERS[name], errors
    assert errors[-1] < (2e-2 if ORDERS[name] == 1 else 2e-3), errors


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_lands_on_a_point_mass(name, schedule):
    """When all data is one point so is the end, for every schedule and kind of network: there is
    one picture of each kind in the batch."""
    point = jnp.linspace(-1.0, 1.0, 12).reshape(1, 2, 2, 3)
    kinds = ["x0", "flow", "edm"]
    if schedule in ("discrete", "no signal"):
        kinds.append("v")  # defined for α² + σ² = 1
    grid = sampling_grid(SCHEDULES[schedule], 7, spacing(SCHEDULES[schedule]))
    if grid.here.alpha[0] > 0.0:
        kinds.append("eps")  # does not determine x0 where there is no signal
    elif name in NEED_SIGNAL:
        with pytest.raises(ValueError, match=f"sampler '{name}' needs some signal"):
            make_table(name, SCHEDULES[schedule], grid)
        return
    if (name, schedule) == ("lcm", "edm"):
        return  # the boundary condition of these models is one of integer timesteps

    def exact(x, level):
        return Prediction(point, (x - level.alpha * point) / level.sigma)

    def denoise(x, level):
        parts = zip(kinds, jnp.split(x, len(kinds)), strict=True)
        predictions = [as_network(exact, kind)(part, level) for kind, part in parts]
        return jax.tree.map(lambda *v: jnp.concatenate(v), *predictions)

    x = jax.random.normal(jax.random.key(0), (len(kinds), 2, 2, 3))
    end = draw(name, x, grid, denoise, SCHEDULES[schedule])
    tolerance = 2e-3 if name == "lcm" else 2e-4 if schedule == "edm" else 2e-5
    np.testing.assert_allclose(end, jnp.broadcast_to(point, x.shape), atol=tolerance)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_ones_reach_the_right_mean_and_spread(name, schedule):
    schedule = SCHEDULES[schedule]
    x = jax.random.normal(jax.random.key(0), (16, 32, 32, 1))
    end = draw(name, x, sampling_grid(schedule, 250, spacing(schedule)), schedule=schedule)
    bias = 0.01 if name in ("ddpm", "euler_ancestral") else 0.004  # of 250 steps
    assert abs(end.mean() - MEAN) < 4 * STD / np.sqrt(x.size) + bias
    assert abs(end.std() - STD) < 4 * STD / np.sqrt(2 * x.size) + bias
    # Not one Gaussian of that mean and spread: the share of the mixture's left part.
    assert abs((end < -0.2).mean() - 0.3037) < 0.02


def test_lcm_draws_from_the_data_when_the_network_is_consistent():
    """With the exact consistency map in place of x0, each step's end has the data's law."""
    width = 0.5

    def consistent(x, level):
        """x0 = 0.2 + 0.5·z for the z whose quantile x has, for data N(0.2, 0.5²)."""
        spread = jnp.sqrt((level.alpha * width) ** 2 + level.sigma**2)
        x0 = 0.2 + width * (x - level.alpha * 0.2) / spread
        return Prediction(x0, (x - level.alpha * x0) / level.sigma)

    x = jax.random.normal(jax.random.key(0), (16, 32, 32, 1))
    end = draw("lcm", x, sampling_grid(SCHEDULE, 4, "lcm"), consistent)
    assert abs(end.mean() - 0.2) < 4 * width / np.sqrt(x.size) + 2e-3
    assert abs(end.std() - width) < 4 * width / np.sqrt(2 * x.size) + 2e-3


def test_churn_keeps_the_distribution():
    x = jax.random.normal(jax.random.key(0), (16, 32, 32, 1))
    grid = sampling_grid(SCHEDULE, 100, "karras")
    for name, bias in (("euler", 0.04), ("heun", 0.01)):
        still, stirred = (draw(name, x, grid, churn=c) for c in (0.0, 20.0))
        assert np.abs(still - stirred).max() > 0.5
        assert abs(stirred.mean() - MEAN) < bias and abs(stirred.std() - STD) < bias


def test_churn_leaves_a_level_without_signal_alone():
    grid = sampling_grid(SCHEDULES["flow"], 10, "trailing")
    table = make_table("euler", SCHEDULES["flow"], grid, churn=5.0)
    assert table["churn"][0] == 0.0 and (table["churn"][1:] > 0.0).all()
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    assert np.isfinite(draw("euler", x, grid, schedule=SCHEDULES["flow"], churn=5.0)).all()


def test_equal_methods_are_equal():
    """Euler over σ/α, over a flow's time and DDIM are one; so are DDPM, DDIM at η = 1 and Euler
    ancestral."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    grid = sampling_grid(SCHEDULE, 10, "trailing")
    ddim = draw("ddim", x, grid)
    for name in ("euler", "flow_euler"):
        np.testing.assert_allclose(draw(name, x, grid), ddim, atol=1e-5)
    ancestral = draw("ddim", x, grid, eta=1.0)
    for name in ("ddpm", "euler_ancestral"):
        np.testing.assert_allclose(draw(name, x, grid), ancestral, atol=1e-5)


def test_ddim_on_the_compat_grid_has_the_originals_numbers():
    """Stable Diffusion at 50 steps: ldm-facts' values of CompVis' DDIM."""
    grid = sampling_grid(SCHEDULE, 50, "compat", family="ddim")
    abar = grid.levels.alpha**2
    assert abar[[-2, 0]] == pytest.approx([0.9982960278, 0.0057755001], rel=1e-8)
    assert abar[-1] == pytest.approx(0.99915, rel=1e-12)
    noise = make_table("ddim", SCHEDULE, grid, eta=1.0)["noise"]
    assert noise[[-1, 0]] == pytest.approx([0.02064832, 0.45446327], rel=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_example_does_not_depend_on_its_batch(name):
    x = jax.random.normal(jax.random.key(0), (8, 4, 4, 1))
    grid = sampling_grid(SCHEDULE, 6, "trailing")
    full = draw(name, x, grid)
    for count in (1, 3):
        np.testing.assert_allclose(draw(name, x[:count], grid), full[:count], atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_3m_sde", "unipc", "heun"])
def test_eight_devices_draw_as_one_does(name):
    x = jax.random.normal(jax.random.key(0), (8, 4, 4, 1))
    grid = sampling_grid(SCHEDULE, 6, "trailing")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    eight = draw(name, spread, grid)
    assert len(eight.sharding.device_set) == 8
    np.testing.assert_allclose(eight, draw(name, x, grid), atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_skipped_steps_are_those_of_a_shorter_run(name):
    """`skip` gives what a run over the remaining levels gives, though its random numbers differ."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    grid = sampling_grid(SCHEDULE, 9, "trailing")
    options = {"eta": 0.0} if "eta" in SAMPLERS[name].options else {}
    if name in ("ddpm", "lcm"):
        options = {}
        assert make_table(name, SCHEDULE, grid, 4)["active"].tolist() == [False] * 4 + [True] * 5
        return
    late = grid.rows(np.s_[4:])
    skipped = draw(name, x, grid, skip=4, **options)
    np.testing.assert_allclose(skipped, draw(name, x, late, **options), atol=1e-6)
    np.testing.assert_array_equal(draw(name, x, grid, skip=9, **options), x)


def test_one_program_for_every_eta_strength_and_grid():
    compiled = []
    keys = example_keys(jax.random.key(0), 2)

    @jax.jit
    def run(x, table):
        compiled.append(1)
        return sample(get_sampler("ddim"), mixture, x, table, keys)

    x = jnp.ones((2, 2, 2, 1))
    for spacing, skip, eta in [("trailing", 0, 0.0), ("leading", 3, 1.0), ("karras", 8, 0.5)]:
        run(x, make_table("ddim", SCHEDULE, sampling_grid(SCHEDULE, 8, spacing), skip, eta=eta))
    assert len(compiled) == 1


@pytest.mark.parametrize("name", ["ddim", "dpmpp_3m_sde", "unipc", "heun"])
def test_memory_does_not_grow_with_the_steps(name):
    """1,000 steps need what 10 need, but for the table of coefficients."""
    keys = example_keys(jax.random.key(0), 2)
    sizes, tables = [], []
    for steps in (10, 1000):
        table = make_table(name, SCHEDULE, sampling_grid(SCHEDULE, steps, "trailing"))
        run = jax.jit(lambda x, table: sample(get_sampler(name), mixture, x, table, keys))
        memory = run.lower(jnp.ones((2, 16, 16, 4)), table).compile().memory_analysis()
        sizes.append(memory.temp_size_in_bytes)
        tables.append(4 * sum(v.size for v in jax.tree.leaves(table)))
    assert sizes[1] - sizes[0] <= 2 * (tables[1] - tables[0])
    assert sizes[1] < 40 * 2 * 16 * 16 * 4 * 4 + 2 * tables[1]


def test_callback_reports_steps_and_predictions_from_inside_the_program():
    seen = {}
    x = jnp.ones((1, 2, 2, 1))
    table = make_table("heun", SCHEDULE, sampling_grid(SCHEDULE, 5, "trailing"))
    keys = example_keys(jax.random.key(1), 1)

    def callback(done, x0):
        seen[int(done)] = np.asarray(x0)

    end = jax.jit(
        lambda x: sample(get_sampler("heun"), mixture, x, table, keys, callback=callback)
    )(x)
    jax.effects_barrier()
    assert sorted(seen) == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(seen[5], end, atol=1e-6)  # the last step goes to its prediction


def test_per_step_values_reach_the_denoiser():
    def denoise(x, level, push):
        prediction = mixture(x, level)
        return Prediction(prediction.x0 + push, prediction.eps)

    grid = sampling_grid(SCHEDULE, 4, "trailing")
    table = make_table("ddim", SCHEDULE, grid)
    keys, x = example_keys(jax.random.key(0), 1), jnp.ones((1, 2, 2, 1))
    ends = [
        sample(get_sampler("ddim"), denoise, x, table, keys, per_step=np.float32(push))
        for push in ([0, 0, 0, 0], [0, 0, 0, 5])
    ]
    np.testing.assert_allclose(ends[1] - ends[0], 5.0, rtol=1e-5)


def test_inversion_undoes_ddim():
    """Noise found by inverting the end of a DDIM run leads there again."""
    grid = sampling_grid(SCHEDULE, 50, "trailing")
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    keys = example_keys(jax.random.key(0), 2)
    end = draw("ddim", x, grid)
    table = DDIM_INVERSE.coefficients(SCHEDULE, grid)
    noise = sample(DDIM_INVERSE, mixture, end, table, keys)
    assert np.abs(noise - x).mean() < 0.05
    np.testing.assert_allclose(draw("ddim", noise, grid), end, atol=5e-3)


def test_an_unknown_sampler_lists_the_known():
    with pytest.raises(ValueError, match="sampler 'euler9': choose one of ddim, ddpm, plms"):
        get_sampler("euler9")
