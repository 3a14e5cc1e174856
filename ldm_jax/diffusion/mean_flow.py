"""MeanFlow: a network of the mean velocity over a span of time (Geng et al. 2025, 2505.13447).

The mean u(z_t, r, t) of the flow's velocity v from r to t leads from z_t to z_r in one step. With
times in [0, 1], dz/dt = v, the derivative of (t − r)·u = ∫ v gives the identity

    u = v − (t − r)·du/dt,    du/dt = v·∂_z u + ∂_t u,

whose right side, with the network's own u, is the target of its left side.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.noise import Examples, all_examples, per_example
from ldm_jax.diffusion.objective import Objective, draw_noise, draw_times
from ldm_jax.diffusion.parameterization import Network
from ldm_jax.diffusion.process import Diffusion
from ldm_jax.diffusion.schedule import Level

# network(x, t, span) with times (B,), of the schedule, and span = t − r.
SpanNetwork = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
DRAWS = ("uniform", "logit_normal", "log_normal")
OF_THE_NOISE = ("draw", "draw_mean", "draw_std", "offset_noise")  # fields of `Objective`


@dataclasses.dataclass(frozen=True)
class MeanFlow:
    """What training of a MeanFlow minimises; the fields are those of a config's section
    `mean_flow`. The defaults are the authors', without guidance.

    Attributes:
      equal: the share of examples with r = t, which learn the velocity itself.
      power, constant: p and c of the weight 1/(‖Δ‖² + c)^p (§4.3). With p = 1 the loss is nearly 1
        whatever the network has learned.
      omega, kappa: ω and κ of guidance (§4.2), learned with the velocity
        ω·v + (1 − ω − κ)·u(z, t, t) + κ·u(z, t, t | c). Its scale is ω/(1 − κ); 1 and 0: none.
      interval: (low, high), shares of the time, 0 clean and 1 noise, outside of which is none.

    Raises ValueError for a number out of range.
    """

    equal: float = 0.75
    power: float = 1.0
    constant: float = 0.01
    omega: float = 1.0
    kappa: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if not 0.0 <= self.equal <= 1.0:
            raise ValueError(f"mean_flow.equal={self.equal:g}: a share of examples, 0 … 1")
        if not (self.power >= 0.0 and self.constant > 0.0):
            raise ValueError("mean_flow: power must be at least 0, and constant above 0")
        if not (self.omega >= 0.0 and 0.0 <= self.kappa < 1.0):
            raise ValueError("mean_flow: omega must be at least 0, and kappa from 0 to below 1")
        if len(self.interval) != 2 or not 0.0 <= self.interval[0] <= self.interval[1] <= 1.0:
            raise ValueError(
                f"mean_flow.interval={tuple(self.interval)}: give two shares of the time, 0 … 1"
            )

    @property
    def guided(self) -> bool:
        """Whether the target needs predictions without and with conditions."""
        return (self.omega, self.kappa) != (1.0, 0.0)


def check_objective(objective: Objective) -> None:
    """Raises ValueError for settings of an objective that MeanFlow, which has its own loss and
    weight, does not use."""
    if objective.draw not in DRAWS:
        raise ValueError(
            f"objective.draw={objective.draw!r}: MeanFlow draws two times, independently: choose "
            f"one of {', '.join(DRAWS)}"
        )
    for field in dataclasses.fields(objective):
        if field.name not in OF_THE_NOISE and getattr(objective, field.name) != field.default:
            raise ValueError(
                f"objective.{field.name}: MeanFlow has its own loss and weight, see mean_flow; "
                f"leave it at {field.default!r}"
            )


def mean_flow_loss(
    options: MeanFlow,
    objective: Objective,
    diffusion: Diffusion,
    network: SpanNetwork,
    latents: jax.Array,
    key: jax.Array,
    *,
    examples: Examples | None = None,
    mask: jax.Array | None = None,
    unconditional: Network | None = None,
    conditional: Network | None = None,
    guides: jax.Array | None = None,
) -> jax.Array:
    """Per-example loss (B,) on clean latents (B, h, w, c): the sum of squares Δ² of the difference
    between `network` and `mean_target`, weighted by 1/(Δ² + c)^p, a constant in the gradient.

    Of `objective` it uses the draw of the times, for t and r alike, and of the noise. All
    randomness comes from each example's own key. `mask` is as in `diffusion_loss`.

    With `options.guided`, `unconditional(x, t)` and `conditional(x, t)` are the network without and
    with conditions at r = t. `guides` (B,) is False for examples that have no guidance in their
    target, because their condition was dropped.
    """
    count, schedule = len(latents), diffusion.schedule
    examples = all_examples(count) if examples is None else examples
    keys = [jax.random.fold_in(key, i) for i in range(4)]
    t, r = draw_span(keys[0], keys[2], keys[3], options, objective, diffusion, examples)
    level = Level(*(v.reshape(count, *[1] * (latents.ndim - 1)) for v in schedule.level(t)))
    eps = draw_noise(keys[1], latents.shape, objective.offset_noise, examples)
    x = level.alpha * latents + level.sigma * eps
    velocity = eps - latents
    if options.guided:
        low, high = (share * schedule.timesteps for share in options.interval)
        on = (t >= low) & (t <= high)
        on = on if guides is None else on & guides
        known = options.omega * velocity
        known += (1.0 - options.omega - options.kappa) * unconditional(x, t)
        if options.kappa:
            known += options.kappa * conditional(x, t)
        velocity = jnp.where(on.reshape(level.t.shape), known, velocity)
    found, goal = mean_target(network, x, t, t - r, velocity, schedule.timesteps)
    squared = jnp.square(found - goal)
    squared = squared if mask is None else squared * mask
    total = jnp.sum(squared, tuple(range(1, latents.ndim)))
    return total / jax.lax.stop_gradient((total + options.constant) ** options.power)


def mean_target(
    network: SpanNetwork,
    x: jax.Array,
    t: jax.Array,
    span: jax.Array,
    velocity: jax.Array,
    timesteps: float,
) -> tuple[jax.Array, jax.Array]:
    """(u, its target v − (t − r)·du/dt), each like x (B, h, w, c), of `network` at x and times t
    and t − span in 0 … `timesteps` (algorithm 1). The target is a constant in the gradient.

    u has one forward derivative: attention must be within `dot_product.forward_derivatives`.
    """
    unit = jnp.full_like(t, timesteps)  # dt of one unit of the flow's time; as r stays, of the span
    velocity = jax.lax.stop_gradient(velocity)

    def u(x, t, span):
        return network(x, t, span).astype(x.dtype)

    found, change = jax.jvp(u, (x, t, span), (velocity, unit, unit))
    share = (span / timesteps).reshape(-1, *[1] * (x.ndim - 1))
    return found, jax.lax.stop_gradient(velocity - share * change)


def draw_span(
    of_one: jax.Array,
    of_other: jax.Array,
    of_equal: jax.Array,
    options: MeanFlow,
    objective: Objective,
    diffusion: Diffusion,
    examples: Examples,
) -> tuple[jax.Array, jax.Array]:
    """Times (t, r), r ≤ t, (B,) each: two draws in order, or, of a share of examples, r = t (§4.3),
    from three keys."""
    o = objective
    one, other = (
        draw_times(own, examples, diffusion.schedule, o.draw, o.draw_mean, o.draw_std)
        for own in (of_one, of_other)
    )
    t = jnp.maximum(one, other)
    share = per_example(jax.random.uniform, of_equal, t.shape, examples)
    return t, jnp.where(share < options.equal, t, jnp.minimum(one, other))
