"""Samplers that evaluate the network once per step and reuse earlier predictions.

All of them are linear: the next x is a combination of this x, of the last few predictions (of x0,
or of ε) and of fresh noise. Only the coefficients differ, so here a sampler is a function from
noise levels to a table, in float64 on the host, and all share the step function `multistep`.

Notation: x = α·x0 + σ·ε here, (α', σ') where the step ends, s = σ/α, λ = −ln s (half the log-SNR),
h = λ' − λ. In the exponential-integrator form (Lu et al. 2022b, eq. 9) a step of first order is
x' = (σ'/σ)·x + (α' − α·σ'/σ)·x0, which is DDIM, and the same as Euler's in y = x/α over s.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.grids import Grid
from ldm_jax.diffusion.parameterization import Denoiser
from ldm_jax.diffusion.schedule import Level, Schedule

Table = dict[str, np.ndarray | Level]
History = tuple[jax.Array, ...]
LMS_ORDER, UNIPC_ORDER = 4, 2  # these determine how much history their steps carry
LCM_TIME_SCALE, LCM_SIGMA_DATA = 10.0, 0.5  # Luo et al. 2023: c_skip and c_out of their models


def multistep(of: str) -> Callable:
    """The step of every sampler below: x' = a·x + Σ_k b_k·v_k + c·noise, v_0 the newest `of`
    ("x0" or "eps") prediction and the others those of the steps before."""

    def step(x, history: History, c, denoise: Denoiser, noise):
        if "churn" in c:
            x = c["churn_x"] * x + c["churn"] * noise
        values = (getattr(denoise(x, c["level"]), of), *history)
        x = c["x"] * x + sum(b * v for b, v in zip(c["b"], values, strict=True))
        return x + c["noise"] * noise if "noise" in c else x, values[:-1]

    return step


def first_order(here: Level, after: Level, sigma_to: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) of x' = a·x + b·x0 = α'·x0 + sigma_to·ε."""
    a = sigma_to / here.sigma
    return a, after.alpha - here.alpha * a


def log_steps(here: Level, after: Level) -> np.ndarray:
    """h = λ' − λ of each step; infinite from no signal, and to no noise."""
    with np.errstate(divide="ignore"):
        return np.log(here.ratio) - np.log(after.ratio)


def earlier(values: np.ndarray, count: int, fill: float) -> np.ndarray:
    """The values of the steps `count` before, `fill` where there was none."""
    return np.concatenate([np.full(count, fill), values])[: len(values)]


def add_churn(
    schedule: Schedule, here: Level, amount: float, low: float, high: float, scale: float
):
    """Karras et al. 2022, algorithm 2: back to a higher level ŝ = (1 + γ)·s before the step.

    Returns the raised levels and the table's entries; without churn, the levels and nothing.
    """
    if not amount:
        return here, {}
    gamma = min(amount / len(here.t), np.sqrt(2.0) - 1.0)
    # Without signal there is no higher level.
    churned = (here.ratio >= low) & (here.ratio <= high) & np.isfinite(here.ratio)
    ratio = np.where(churned, here.ratio, 1.0)
    raised = schedule.from_ratio(ratio * (1.0 + gamma))
    added = scale * raised.alpha * ratio * np.sqrt((1.0 + gamma) ** 2 - 1.0)
    kept = raised.alpha / np.where(churned, here.alpha, 1.0)
    raised = Level(*(np.where(churned, r, h) for r, h in zip(raised, here, strict=True)))
    return raised, {"churn_x": np.where(churned, kept, 1.0), "churn": np.where(churned, added, 0.0)}


def ddim(schedule: Schedule, grid: Grid, eta: float = 0.0) -> Table:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12 and 16).

    η = 1 is ancestral sampling: on all T timesteps the posterior of Ho et al. 2020, eq. 6–7. In σ/α
    it is k-diffusion's Euler ancestral: the same split of σ' into the step's and the noise's part.
    """
    here, after = grid
    drawn = (
        eta
        * after.sigma
        * np.sqrt(1.0 - (after.sigma * here.alpha) ** 2 / (after.alpha * here.sigma) ** 2)
    )
    drawn = np.minimum(drawn, after.sigma)
    a, b = first_order(here, after, np.sqrt(after.sigma**2 - drawn**2))
    return {"level": here, "x": a, "b": b[:, None], "noise": drawn}


def ddpm(schedule: Schedule, grid: Grid) -> Table:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) with the smaller variance, β̃_t."""
    return ddim(schedule, grid, eta=1.0)


def euler(
    schedule: Schedule,
    grid: Grid,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = np.inf,
    churn_scale: float = 1.0,
) -> Table:
    """Euler's method for dy/ds = ε (Karras et al. 2022, eq. 1); without churn it equals DDIM."""
    here, after = grid
    raised, table = add_churn(schedule, here, churn, churn_min, churn_max, churn_scale)
    a, b = first_order(raised, after, after.sigma)
    return table | {"level": raised, "x": a, "b": b[:, None]}


def lcm(schedule: Schedule, grid: Grid) -> Table:
    """Latent consistency models (Luo et al. 2023, algorithm 3): to x0, then fresh noise."""
    here, after = grid
    skip, out = consistency_coefficients(here.t)
    a, b = after.alpha * skip, after.alpha * out
    return {"level": here, "x": a, "b": b[:, None], "noise": after.sigma}


def consistency_coefficients(t):
    """(c_skip, c_out) of f(x_t) = c_skip·x_t + c_out·x0 at timesteps `t`: at 0 f is the identity
    (Luo et al. 2023, eq. 9, with the time scale of their code)."""
    scaled = t * LCM_TIME_SCALE
    total = scaled**2 + LCM_SIGMA_DATA**2
    return LCM_SIGMA_DATA**2 / total, scaled / total**0.5


def dpmpp_2m(schedule: Schedule, grid: Grid) -> Table:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2); first order where the last step is long or
    there is no earlier prediction."""
    here, after = grid
    a, b = first_order(here, after, after.sigma)
    slope = b * _over_twice_r(here, after)
    return {"level": here, "x": a, "b": np.stack([b + slope, -slope], axis=1)}


def _over_twice_r(here: Level, after: Level) -> np.ndarray:
    """1/2r = h/2h₋₁, zero for the steps that are to be of first order."""
    h = log_steps(here, after)
    before = earlier(h, 1, np.inf)
    with np.errstate(invalid="ignore"):
        value = np.where(np.isinf(before) | np.isinf(h), 0.0, h / (2.0 * before))
    if len(h) < 15:  # as in the authors' code: few steps are long, and the last is the longest
        value[-1] = 0.0
    return value


def dpmpp_2m_sde(schedule: Schedule, grid: Grid, eta: float = 1.0) -> Table:
    """DPM-Solver++(2M) for the reverse-time SDE, midpoint form (Lu et al. 2022b, §5; k-diffusion).

    η scales the noise; 0 is the ordinary differential equation.
    """
    here, after = grid
    h = log_steps(here, after)
    before = earlier(h, 1, np.inf)
    decay = np.exp(-eta * h) if eta else np.ones_like(h)
    total = -np.expm1(-(1.0 + eta) * h)
    with np.errstate(invalid="ignore"):
        slope = np.where(np.isinf(before) | np.isinf(h), 0.0, 0.5 * total * h / before)
    b = after.alpha[:, None] * np.stack([total + slope, -slope], axis=1)
    drawn = after.sigma * np.sqrt(1.0 - decay**2)
    return {"level": here, "x": after.sigma / here.sigma * decay, "b": b, "noise": drawn}


def dpmpp_3m_sde(schedule: Schedule, grid: Grid, eta: float = 1.0) -> Table:
    """DPM-Solver++ of third order for the reverse-time SDE (k-diffusion's `dpmpp_3m_sde`).

    The first and second differences of x0 over λ enter with φ₂ and φ₃ of (1 + η)·h.
    """
    here, after = grid
    h = log_steps(here, after)
    weights = np.zeros((len(h), 3))  # of x0, of its predecessor, and of the one before
    weights[:, 0] = -np.expm1(-(1.0 + eta) * h)
    for i in range(1, len(h)):
        if np.isinf(h[i - 1 : i + 1]).any():
            continue
        total = (1.0 + eta) * h[i]
        phi2 = np.expm1(-total) / total + 1.0
        phi3 = phi2 / total - 0.5
        r0 = h[i - 1] / h[i]
        newest = np.array([1.0, -1.0, 0.0]) / r0
        if i == 1 or np.isinf(h[i - 2]):
            weights[i] += phi2 * newest
            continue
        r1 = h[i - 2] / h[i]
        second = (newest - np.array([0.0, 1.0, -1.0]) / r1) / (r0 + r1)
        weights[i] += phi2 * (newest + r0 * second) - phi3 * second
    decay = np.exp(-eta * h) if eta else np.ones_like(h)
    drawn = after.sigma * np.sqrt(1.0 - decay**2)
    a = after.sigma / here.sigma * decay
    return {"level": here, "x": a, "b": after.alpha[:, None] * weights, "noise": drawn}


def lms(schedule: Schedule, grid: Grid) -> Table:
    """Linear multistep over s (k-diffusion's `lms`): each past ε weighs the integral over the step
    of its Lagrange polynomial, computed exactly."""
    here, after = needs_signal("lms", grid)
    s = np.append(here.ratio, after.ratio[-1])
    weights = np.zeros((len(here.t), LMS_ORDER))
    for i in range(len(here.t)):
        past = s[max(0, i - LMS_ORDER + 1) : i + 1][::-1]
        for k, node in enumerate(past):
            others = np.delete(past, k)
            basis = np.poly1d(others, r=True) / np.prod(node - others)
            integral = basis.integ()
            weights[i, k] = integral(s[i + 1]) - integral(s[i])
    b = after.alpha[:, None] * weights
    return {"level": here, "x": after.alpha / here.alpha, "b": b}


def plms(schedule: Schedule, grid: Grid) -> Table:
    """Pseudo linear multistep (Liu et al. 2022, eq. 12), Adams–Bashforth weights in DDIM's step.

    As in CompVis' code, the first step averages ε at its start and at the start of the second step
    (see `plms_step`). If it does not end there, it is, as in diffusers, a step of its own length
    down to there.
    """
    here, after = needs_signal("plms", grid)
    weights = np.zeros((len(here.t), 4))
    adams_bashforth = (
        [1.0],
        [3 / 2, -1 / 2],
        [23 / 12, -16 / 12, 5 / 12],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    )
    for i in range(len(weights)):
        row = adams_bashforth[min(i, 3)]
        weights[i, : len(row)] = row
    a = after.alpha / here.alpha
    gain = after.sigma - here.sigma * a
    ahead = np.stack([a, gain], axis=1)
    second = Level(*(np.append(v[1:], v[-1:]) for v in here))
    first = (np.arange(len(weights)) == 0) & (len(weights) > 1)
    if first[0] and second.t[0] != after.t[0]:
        before = schedule.at(second.t[0] + here.t[0] - after.t[0])
        a[0] = second.alpha[0] / before.alpha
        gain[0] = second.sigma[0] - before.sigma * a[0]
    b = gain[:, None] * weights
    return {"level": here, "x": a, "b": b, "first": first, "second": second, "ahead": ahead}


def plms_step(x, history: History, c, denoise: Denoiser, noise):
    """`multistep("eps")`, except that the first step is a pseudo improved Euler step."""
    del noise
    eps = denoise(x, c["level"]).eps

    def improved():
        ahead = c["ahead"][0] * x + c["ahead"][1] * eps
        return c["x"] * x + c["b"][0] * (eps + denoise(ahead, c["second"]).eps) / 2.0

    def combined():
        values = (eps, *history)
        return c["x"] * x + sum(b * v for b, v in zip(c["b"], values, strict=True))

    x = jax.lax.cond(c["first"], improved, combined)
    return x, (eps, *history[:-1])


def unipc(schedule: Schedule, grid: Grid) -> Table:
    """Unified predictor-corrector (Zhao et al. 2023, algorithms 5–8), B(h) = e^h − 1, on x0.

    Every evaluation is used twice: to correct the step before it, and to predict the next.
    """
    here, after = grid
    h = log_steps(here, after)
    steps = len(h)
    predictor, corrector = np.zeros((steps, UNIPC_ORDER)), np.zeros((steps, UNIPC_ORDER + 1))
    a, b = first_order(here, after, after.sigma)
    for i in range(steps):
        # The number of earlier points: few at the start and, as in the authors' code, at the end.
        past, most = 0, 0 if np.isinf(h[i]) else min(UNIPC_ORDER - 1, i, steps - 1 - i)
        while past < most and np.isfinite(h[i - past - 1]):
            past += 1
        # The positions of those points, in units of h from the start of the step; its end is 1.
        r = -np.cumsum(h[i - past : i][::-1]) / h[i] if past else np.zeros(0)
        predictor[i] = _unipc_weights(r, h[i], corrector=False, slots=UNIPC_ORDER)
        if i + 1 < steps and np.isfinite(h[i]):
            corrector[i + 1] = _unipc_weights(r, h[i], corrector=True, slots=UNIPC_ORDER + 1)
        elif i + 1 < steps:
            corrector[i + 1, 1] = 1.0  # from no signal: x0 alone, as predicted
    a_before, b_before = earlier(a, 1, 0.0), earlier(b, 1, 0.0)
    return {
        "level": here,
        "x": a,
        "b": b[:, None] * predictor,
        "x_before": a_before,
        "c": b_before[:, None] * corrector,
        "first": np.arange(steps) == 0,
    }


def _unipc_weights(r: np.ndarray, h: float, corrector: bool, slots: int) -> np.ndarray:
    """Weights of the x0 predictions, newest first, in units of α'·(1 − e^{−h}).

    The differences (x0_k − x0)/r_k to the points at r_k·h, and for the corrector to the end at 1,
    are combined so that polynomials of as high a degree as possible are integrated exactly.
    """
    weights = np.zeros(slots)
    start = 1 if corrector else 0  # slot of the prediction at the start of the step
    weights[start] = 1.0
    nodes = np.append(r, 1.0) if corrector else r
    if not len(nodes):
        return weights
    z = -h
    phi, factorial, moments = np.expm1(z) / z - 1.0, 1.0, []
    for k in range(1, len(nodes) + 1):
        moments.append(phi * factorial / np.expm1(z))
        factorial *= k + 1
        phi = phi / z - 1.0 / factorial
    if len(nodes) == 1:
        rho = np.array([0.5])  # as in the authors' code: the solution to leading order
    else:
        rho = np.linalg.solve(np.vander(nodes, increasing=True).T, moments)
    for k, (node, weight) in enumerate(zip(nodes, rho, strict=True)):
        at_end = corrector and k == len(nodes) - 1
        weights[0 if at_end else start + 1 + k] += weight / node
        weights[start] -= weight / node
    return weights


def unipc_step(x, history: History, c, denoise: Denoiser, noise):
    """Corrects the last step, then predicts. `history`: x before, and past x0 predictions."""
    del noise
    before, *past = history
    x0 = denoise(x, c["level"]).x0
    values = (x0, *past)
    corrected = c["x_before"] * before + sum(b * v for b, v in zip(c["c"], values, strict=True))
    x = jnp.where(c["first"], x, corrected)
    ahead = c["x"] * x + sum(b * v for b, v in zip(c["b"], values[:-1], strict=True))
    return ahead, (x, *values[:-1])


def needs_signal(name: str, grid: Grid) -> Grid:
    """The grid; raises for one without signal at its start, where ε does not determine x0."""
    if grid.here.alpha[0] == 0.0:
        raise ValueError(
            f"sampler {name!r} needs some signal at its first level, and this schedule has none "
            "there; choose ddim, dpmpp_2m, unipc or flow_heun"
        )
    return grid
