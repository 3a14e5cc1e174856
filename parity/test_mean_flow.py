"""The MeanFlow loss and its gradient against algorithm 1 (Geng et al. 2025) with `torch.func.jvp`.

Nothing of the authors' is installed: the algorithm is written out in torch, with their time in
0 … 1, on the times and the noise that we draw. The network is a convolution and a bilinear form of
the two times, in either library.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ldm_jax.diffusion.mean_flow import MeanFlow, draw_span, mean_flow_loss
from ldm_jax.diffusion.noise import all_examples
from ldm_jax.diffusion.objective import Objective, draw_noise
from ldm_jax.diffusion.process import Diffusion
from ldm_jax.diffusion.schedule import FlowSchedule

SHAPE = (16, 6, 6, 3)
KEY = jax.random.key(5)
LATENTS = np.asarray(jax.random.normal(jax.random.key(0), SHAPE))
KERNEL = np.asarray(0.3 * jax.random.normal(jax.random.key(1), (3, 3, 3, 3)))  # HWIO
NULL = 0.7  # what replaces the condition, 0
OBJECTIVE = Objective(draw="logit_normal", draw_mean=-0.4)
OPTIONS = {
    "as in the paper": MeanFlow(),
    "all apart": MeanFlow(equal=0.0, power=0.75, constant=1e-3),
    "guided": MeanFlow(equal=0.5, omega=2.0),
    "guided by both": MeanFlow(equal=0.5, omega=0.2, kappa=0.92, interval=(0.2, 0.8)),
}


def ours(options, kernel, timesteps):
    def u(x, t, span, turn=0.0):
        t, span = (jnp.reshape(v, (-1, 1, 1, 1)) / timesteps for v in (t, span))
        dimensions = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
        return jnp.tanh(h + 2.0 * t - span + turn) * (1.0 + t * span)

    return mean_flow_loss(
        *(options, OBJECTIVE, Diffusion(FlowSchedule(timesteps), "meanflow"), u, LATENTS, KEY),
        unconditional=lambda x, t: u(x, t, jnp.zeros_like(t), NULL),
        conditional=lambda x, t: u(x, t, jnp.zeros_like(t)),
    )


def theirs(options, kernel, latents, e, t, r):
    """Of (B, c, h, w) and times (B, 1, 1, 1): the loss of each example."""

    def net(z, t, h, turn=0.0):
        found = torch.nn.functional.conv2d(z, kernel, padding=1)
        return torch.tanh(found + 2.0 * t - h + turn) * (1.0 + t * h)

    z, v = (1 - t) * latents + t * e, e - latents
    low, high = options.interval
    inside = (t >= low) & (t <= high)
    omega = torch.where(inside, options.omega, 1.0)
    kappa = torch.where(inside, options.kappa, 0.0)
    zero = torch.zeros_like(t)
    guided = omega * v + (1 - omega - kappa) * net(z, t, zero, NULL) + kappa * net(z, t, zero)

    def u(z, r, t):
        return net(z, t, t - r)

    tangents = (guided, torch.zeros_like(r), torch.ones_like(t))
    found, change = torch.func.jvp(u, (z, r, t), tangents)
    goal = (guided - (t - r) * change).detach()
    total = (found - goal).square().sum((1, 2, 3))
    return total / (total.detach() + options.constant) ** options.power


@pytest.mark.parametrize("timesteps", [1, 1000])
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradient(name, timesteps):
    options = OPTIONS[name]

    def mean(kernel):
        losses = ours(options, kernel, timesteps)
        return jnp.mean(losses), losses

    gradient, found = jax.jit(jax.grad(mean, has_aux=True))(KERNEL)
    keys = [jax.random.fold_in(KEY, i) for i in range(4)]
    diffusion, examples = Diffusion(FlowSchedule(timesteps), "meanflow"), all_examples(SHAPE[0])
    span = draw_span(keys[0], keys[2], keys[3], options, OBJECTIVE, diffusion, examples)
    t, r = (torch.tensor(np.asarray(v)).double().reshape(-1, 1, 1, 1) / timesteps for v in span)
    eps = np.array(draw_noise(keys[1], SHAPE))
    latents, e = (torch.tensor(v).double().permute(0, 3, 1, 2) for v in (LATENTS, eps))
    kernel = torch.tensor(KERNEL).double().permute(3, 2, 0, 1).requires_grad_()
    expected = theirs(options, kernel, latents, e, t, r)
    expected.mean().backward()
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-6)
    scale = float(kernel.grad.abs().max())
    np.testing.assert_allclose(gradient, kernel.grad.permute(2, 3, 1, 0), atol=1e-5 * scale)
