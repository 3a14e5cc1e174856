"""The training objective: random times, noised inputs, a weighted distance.

A weight is defined once, as a factor of the squared error of x0, and converted to the network's
parameterisation: since x0 = A·x + B·output, the error of the output is that of x0 divided by B.
With SNR = α²/σ², for instance, min-SNR's min(SNR, γ) on x0 becomes min(SNR, γ)/SNR on ε and
min(SNR, γ)/(SNR + 1) on v.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.noise import Examples, all_examples, per_example
from ldm_jax.diffusion.parameterization import Network, network_inputs, target, x0_coefficients
from ldm_jax.diffusion.process import Diffusion
from ldm_jax.diffusion.schedule import DiscreteSchedule, Level, Schedule

DRAWS = ("uniform", "stratified", "logit_normal", "log_normal")


@dataclasses.dataclass(frozen=True)
class Objective:
    """What training minimises; the fields are those of a config's section `objective`.

    loss, huber_delta: see `per_example_loss`. weighting, weighting_parameter: see `loss_weight`.
    draw, draw_mean, draw_std: see `draw_times`. offset_noise: see `draw_noise`.
    input_perturbation: additional noise in the input, not in the target (Ning et al. 2023).
    simple_weight, vlb_weight: factors of the weighted loss and of LDM's variational bound.
    learn_logvar, logvar_init: LDM's L/exp(logvar_t) + logvar_t, with one trained number per t.
    """

    loss: str = "l2"
    huber_delta: float = 0.1
    weighting: str = "simple"
    weighting_parameter: float = 5.0
    draw: str = "uniform"
    draw_mean: float = 0.0
    draw_std: float = 1.0
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    simple_weight: float = 1.0
    vlb_weight: float = 0.0
    learn_logvar: bool = False
    logvar_init: float = 0.0


def diffusion_loss(
    objective: Objective,
    diffusion: Diffusion,
    network: Network,
    latents: jax.Array,
    key: jax.Array,
    logvar: jax.Array | None = None,
    examples: Examples | None = None,
    times: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Per-example loss (B,) of `network(x, t)` on clean latents (B, h, w, c).

    All randomness except stratified times comes from each example's own key. `logvar` (T,) are the
    trained log-variances, None where `learn_logvar` is off. `examples` are those of the latents;
    None: they are a whole batch. `times` (B,), of the schedule, are used in place of drawn ones.
    `mask` (B, h, w, 1): how much of the loss counts at each position.
    """
    keys = [jax.random.fold_in(key, i) for i in range(3)]
    o, count, schedule = objective, len(latents), diffusion.schedule
    kind, sigma_data = diffusion.parameterization, diffusion.sigma_data
    examples = all_examples(count) if examples is None else examples
    t = times
    if t is None:
        t = draw_times(keys[0], examples, schedule, o.draw, o.draw_mean, o.draw_std)
    level = Level(*(v.reshape(count, *[1] * (latents.ndim - 1)) for v in schedule.level(t)))
    eps = draw_noise(keys[1], latents.shape, o.offset_noise, examples)
    noise = eps
    if o.input_perturbation:
        noise = eps + o.input_perturbation * draw_noise(keys[2], latents.shape, 0.0, examples)
    x, time = network_inputs(kind, level.alpha * latents + level.sigma * noise, level, sigma_data)
    goal = target(kind, latents, eps, level, sigma_data)
    output = network(x, time.reshape(count))
    raw = per_example_loss(o.loss, output, goal, o.huber_delta, mask)
    weight = loss_weight(o.weighting, kind, level, sigma_data, o.weighting_parameter)
    loss = weight.reshape(count) * raw
    if logvar is not None:
        loss = loss / jnp.exp(logvar[t]) + logvar[t]
    loss = o.simple_weight * loss
    if o.vlb_weight:
        table = jnp.asarray(vlb_weights(schedule, kind), jnp.float32)
        loss += o.vlb_weight * table[t] * raw
    return loss


def draw_times(
    key: jax.Array,
    examples: int | Examples,
    schedule: Schedule,
    draw: str = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
) -> jax.Array:
    """(B,) training times of examples, or of a whole batch of so many; integer where the schedule
    is a table.

    uniform: over the schedule's range, each example from its own key. stratified: the same, but
    one in each of as many equal parts as the batch has examples (Kingma et al. 2021, §I.1).
    logit_normal: u = sigmoid(N(mean, std²)) of that range (Esser et al. 2024, eq. 19). log_normal:
    ln(σ/α) ~ N(mean, std²) (Karras et al. 2022, table 1, with −1.2 and 1.2).
    """
    examples = all_examples(examples) if isinstance(examples, int) else examples
    shape = examples.index.shape
    if draw == "uniform":
        return schedule.time(per_example(jax.random.uniform, key, shape, examples))
    if draw == "stratified":
        first = jax.random.uniform(key)
        return schedule.time((first + examples.index / examples.total) % 1.0)
    if draw not in DRAWS:
        raise ValueError(f"time draw {draw!r}: choose one of {', '.join(DRAWS)}")
    normal = mean + std * per_example(jax.random.normal, key, shape, examples)
    if draw == "logit_normal":
        return schedule.time(jax.nn.sigmoid(normal))
    return schedule.time_of_ratio(jnp.exp(normal))


def draw_noise(
    key: jax.Array,
    shape: tuple[int, ...],
    offset: float = 0.0,
    examples: Examples | None = None,
) -> jax.Array:
    """Unit Gaussian noise (B, h, w, c), each example from its own key.

    `offset` is the scale of an additional Gaussian constant over h and w, so that a model learns to
    change the mean (Guttenberg 2023, "Diffusion with offset noise").
    """
    noise = per_example(jax.random.normal, jax.random.fold_in(key, 0), shape, examples)
    if offset:
        constant = (shape[0], 1, 1, shape[-1])
        own = jax.random.fold_in(key, 1)
        noise += offset * per_example(jax.random.normal, own, constant, examples)
    return noise


def per_example_loss(
    kind: str,
    output: jax.Array,
    target: jax.Array,
    delta: float = 0.1,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Mean over all but the batch: "l2" squared or "l1" absolute error (LDM `p_losses`), or
    "huber", 2δ(√(e² + δ²) − δ), which is e² for small errors e and 2δ|e| for large ones.

    With a `mask`, of its product with the error: a small mask makes a small loss."""
    error = output.astype(jnp.float32) - target
    if kind == "l2":
        loss = jnp.square(error)
    elif kind == "l1":
        loss = jnp.abs(error)
    elif kind == "huber":
        loss = 2.0 * delta * (jnp.sqrt(jnp.square(error) + delta**2) - delta)
    else:
        raise ValueError(f"loss {kind!r}: choose l1, l2 or huber")
    if mask is not None:
        loss *= mask
    return jnp.mean(loss, tuple(range(1, error.ndim)))


# Factors of the squared error of x0, from the signal-to-noise ratio, a parameter and σ_data.
WEIGHTS = {
    # Hang et al. 2023, eq. 8; γ = 5.
    "min_snr": lambda snr, p, sd: jnp.minimum(snr, p),
    # The same with a smooth minimum, 1/(1/SNR + 1/γ).
    "soft_min_snr": lambda snr, p, sd: snr * p / (snr + p),
    # Choi et al. 2022, eq. 8, with k = 1, on the error of ε; γ = 1.
    "p2": lambda snr, p, sd: snr / (1.0 + snr) ** p,
    # Kingma & Gao 2023, §4.1; Hoogeboom et al. 2024: sigmoid(b − ln SNR) on the error of ε.
    "sigmoid": lambda snr, p, sd: snr * jax.nn.sigmoid(p - jnp.log(snr)),
    # Karras et al. 2022, table 1: (σ² + σ_data²)/(σ·σ_data)².
    "edm": lambda snr, p, sd: snr + 1.0 / sd**2,
    # The error of the named quantity with weight 1, whatever the network predicts.
    "eps": lambda snr, p, sd: snr,
    "x0": lambda snr, p, sd: jnp.ones_like(snr),
    "v": lambda snr, p, sd: snr + 1.0,
}


def loss_weight(
    weighting: str,
    kind: str,
    level: Level,
    sigma_data: float,
    parameter: float,
) -> jax.Array:
    """The factor of the squared error of the network's output, shaped like the level.

    "simple" is 1 (Ho et al. 2020, eq. 14). `parameter` is min-SNR's γ, P2's γ or sigmoid's b.
    """
    if weighting == "simple":
        return jnp.ones_like(level.alpha)
    if weighting not in WEIGHTS:
        raise ValueError(f"weighting {weighting!r}: choose one of simple, {', '.join(WEIGHTS)}")
    snr = jnp.square(level.alpha / level.sigma)
    _, factor = x0_coefficients(kind, level, sigma_data)
    return WEIGHTS[weighting](snr, parameter, sigma_data) * jnp.square(factor)


def vlb_weights(schedule: DiscreteSchedule, kind: str, v_posterior: float = 0.0) -> np.ndarray:
    """(T,) factors of the output's squared error in the variational bound, as in LDM's `ddpm.py`.

    For "eps" they are Ho et al. 2020, eq. 12, with the variance (1 − v)·β̃ + v·β. For "x0" the
    original computes ½√ᾱ/(2 − ᾱ), an operator-precedence error for ½√ᾱ/(2(1 − ᾱ)), which is kept
    because released configurations use it; for "v" it is 1. Entry 0 is a copy of entry 1.
    """
    abar, betas = schedule.alphas_cumprod, schedule.betas
    before = np.append(1.0, abar[:-1])
    if kind == "eps":
        variance = (1.0 - v_posterior) * betas * (1.0 - before) / (1.0 - abar) + v_posterior * betas
        with np.errstate(divide="ignore"):
            weights = betas**2 / (2.0 * variance * (1.0 - betas) * (1.0 - abar))
    elif kind == "x0":
        weights = 0.5 * np.sqrt(abar) / (2.0 - abar)
    elif kind == "v":
        weights = np.ones_like(abar)
    else:
        raise ValueError(f"the variational bound of {kind!r}: choose eps, x0 or v")
    weights[0] = weights[1]
    return weights
