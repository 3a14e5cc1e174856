"""ControlNet: without effect at first, and bad input in one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.controlnet import ControlNet, initial
from ldm_jax.models.unet import UNet

UNET = UNet(
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_heads=2,
    context_dim=8,
    groups=4,
)
NET = ControlNet(UNET)
X, T, CONTEXT = jnp.ones((1, 4, 4, 4)), jnp.ones(1), jnp.ones((1, 3, 8))


def random_params(module, **hint):
    shapes = jax.eval_shape(module.init, jax.random.key(0), X, T, CONTEXT, **hint)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: np.float32(0.1 * rng.standard_normal(s.shape)), shapes)


def test_zero_convolutions_change_no_bit_and_others_do():
    hint = np.random.default_rng(1).uniform(size=(1, 32, 32, 3)).astype(np.float32)
    unet = random_params(UNET)
    params = initial(random_params(NET, hint=hint), unet)
    assert params["input_blocks_1_0"] is unet["input_blocks_1_0"]
    closed = {
        name: jax.tree.map(np.zeros_like, leaves) if name[:4] == "zero" or "out" in name else leaves
        for name, leaves in params.items()
    }

    @jax.jit
    def drawn(params):
        residuals = NET.apply({"params": params}, X, T, CONTEXT, hint=hint)
        return UNET.apply({"params": unet}, X, T, CONTEXT, residuals=residuals)

    plain = jax.jit(lambda: UNET.apply({"params": unet}, X, T, CONTEXT))()
    np.testing.assert_array_equal(drawn(closed), plain)
    assert np.abs(drawn(params) - plain).max() > 1e-3


@pytest.mark.parametrize("side, message", [
    (48, "a hint of 48 × 48 pixels for a picture of 32 × 32"),
])  # fmt: skip
def test_a_hint_of_another_size(side, message):
    with pytest.raises(ValueError, match=message):
        random_params(NET, hint=jnp.ones((1, side, side, 3)))


def test_residuals_of_another_network():
    with pytest.raises(ValueError, match="takes 4 . 1 residuals and got 2: they are of a ControlN"):
        random_params(UNET, residuals=(X, X))
