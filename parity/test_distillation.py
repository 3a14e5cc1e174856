"""Losses of distillation against the formulas of diffusers' script, train_lcm_distill_sd_wds.py, in
torch: values, and gradients of a small network, on the same draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from ldm_jax.diffusion.distillation import consistency_loss
from ldm_jax.diffusion.guidance import classifier_free
from ldm_jax.diffusion.noise import all_examples
from ldm_jax.diffusion.process import Diffusion
from ldm_jax.diffusion.schedule import make_schedule

COUNT, STEPS, DELTA = 6, 50, 1e-3
BETAS = dict(beta_start=0.00085, beta_end=0.012)


def torch_loss(kind, latents, noise, index, omega, student, cond, uncond):
    """The script's loss. Networks take (x, t); `omega` is its w: guidance − 1."""
    ddim = DDIMScheduler(1000, **BETAS, beta_schedule="scaled_linear")
    abar = ddim.alphas_cumprod
    alphas, sigmas = abar.sqrt(), (1 - abar).sqrt()
    grid = np.arange(1, STEPS + 1) * (1000 // STEPS) - 1
    previous = torch.cat([abar[:1], abar[torch.as_tensor(grid[:-1])]])
    start = torch.as_tensor(grid)[index]
    end = (start - 1000 // STEPS).clamp(min=0)

    def at(table, t):
        return table[t].reshape(-1, 1, 1, 1)

    def scalings(t):
        scaled = 10.0 * t.reshape(-1, 1, 1, 1)
        total = scaled**2 + 0.5**2
        return 0.5**2 / total, scaled / total**0.5

    def both(output, x, t):
        a, s = at(alphas, t), at(sigmas, t)
        if kind == "eps":
            return (x - s * output) / a, output
        return a * x - s * output, a * output + s * x

    noisy = at(alphas, start) * latents + at(sigmas, start) * noise
    skip, out = scalings(start)
    found = skip * noisy + out * both(student(noisy, start), noisy, start)[0]
    with torch.no_grad():
        w = omega.reshape(-1, 1, 1, 1)
        c, u = both(cond(noisy, start), noisy, start), both(uncond(noisy, start), noisy, start)
        x0, eps = (a + w * (a - b) for a, b in zip(c, u, strict=True))
        last = previous[index].reshape(-1, 1, 1, 1)
        reached = last.sqrt() * x0 + (1 - last).sqrt() * eps
        skip, out = scalings(end)
        goal = skip * reached + out * both(student(reached, end), reached, end)[0]
    return (((found - goal) ** 2 + DELTA**2).sqrt() - DELTA).mean()


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_consistency(agree, kind):
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((3, 3)).astype(np.float32) for n in ("s", "c", "u")}
    key, scale = jax.random.key(3), rng.uniform(3, 13, COUNT).astype(np.float32)
    latents = rng.standard_normal((COUNT, 4, 4, 3)).astype(np.float32)
    seen = {}

    def ours(w):
        def network(w):
            def output(x, t):
                seen.setdefault("x", x)
                seen.setdefault("t", t)
                return jnp.tanh(x @ w) + 1e-3 * t.reshape(-1, 1, 1, 1)

            return output

        def conditional(x, t, c):
            values = c[:, None, None, None]
            return (1 - values) * network(weights["u"])(x, t) + values * network(weights["c"])(x, t)

        one, zero = jnp.ones(COUNT), jnp.zeros(COUNT)
        teacher = classifier_free(conditional, [one], zero, 1.0, jnp.asarray(scale)[None])
        diffusion = Diffusion(make_schedule("linear", 1000, *BETAS.values()), kind)
        loss = consistency_loss(
            diffusion, network(w), teacher, latents, key, all_examples(COUNT), delta=DELTA
        )
        return loss.mean()

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(weights["s"]))
    # The draws, from the teacher's own input.
    seen.clear()
    ours(jnp.asarray(weights["s"]))
    t = np.asarray(seen["t"])[:COUNT]
    level = make_schedule("linear", 1000, *BETAS.values()).at(t)
    alpha, sigma = (np.asarray(v).reshape(-1, 1, 1, 1) for v in (level.alpha, level.sigma))
    noise = (np.asarray(seen["x"])[:COUNT] - alpha * latents) / sigma

    def torch_network(w):
        return lambda x, t: torch.tanh(x @ w) + 1e-3 * t.reshape(-1, 1, 1, 1)

    w = torch.from_numpy(weights["s"]).requires_grad_()
    cond, uncond = (torch_network(torch.from_numpy(weights[n])) for n in "cu")
    expected = torch_loss(
        kind,
        *(torch.from_numpy(np.float32(v)) for v in (latents, noise)),
        torch.as_tensor((t + 1) // 20 - 1),
        torch.from_numpy(scale - 1.0),
        torch_network(w),
        cond,
        uncond,
    )
    expected.backward()
    assert float(expected) > 0.1 and len(set(t.tolist())) > 2
    agree(np.asarray(value), expected.detach().numpy(), tolerance=1e-5)
    agree(np.asarray(gradient), w.grad.numpy(), tolerance=1e-5)
