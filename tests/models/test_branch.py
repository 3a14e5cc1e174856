"""A UNet from its deep features on, as DeepCache runs it: the parts are the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.controlnet import ControlNet
from ldm_jax.models.t2i_adapter import feature_places
from ldm_jax.models.unet import UNet

SMALL = dict(model_channels=16, num_heads=2, groups=4)
UNETS = {
    "sd": UNet(
        num_res_blocks=2, channel_mult=(1, 2), attention_resolutions=(1,), context_dim=8, **SMALL
    ),
    "updown": UNet(
        num_res_blocks=1,
        channel_mult=(1, 2, 2),
        attention_resolutions=(2,),
        resblock_updown=True,
        use_scale_shift_norm=True,
        **SMALL,
    ),
}


def inputs(unet):
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 4))
    context = None if unet.context_dim is None else jnp.ones((2, 3, unet.context_dim))
    return x, jnp.full(2, 500.0), context


def random_params(module, *given, **options):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *given, **options)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: np.float32(0.2 * rng.standard_normal(s.shape)), shapes)


@pytest.mark.parametrize("name", UNETS)
def test_every_branch_is_the_whole_with_its_own_features(name):
    unet = UNETS[name]
    given = inputs(unet)
    params = random_params(unet, *given)

    @jax.jit
    def outputs():
        apply = {"params": params}
        plain = unet.apply(apply, *given)
        made = [unet.apply(apply, *given, branch=i) for i in range(unet.skips)]
        again = [unet.apply(apply, *given, branch=i, deep=deep) for i, (_, deep) in enumerate(made)]
        other = unet.apply(apply, *given, branch=0, deep=jnp.ones_like(made[0][1]))
        return plain, made, again, other[0]

    plain, made, again, other = outputs()
    for (whole, deep), (part, kept) in zip(made, again, strict=True):
        np.testing.assert_allclose(whole, plain, atol=1e-6)
        np.testing.assert_allclose(part, plain, atol=1e-5)
        np.testing.assert_array_equal(kept, deep)
    assert np.abs(other - plain).max() > 1e-2
    # The outermost branch has the first convolution, the last block and the ends alone.
    few = jax.eval_shape(
        lambda: unet.init(jax.random.key(0), *given, branch=0, deep=made[0][1])["params"]
    )
    assert {name.partition("_")[0] for name in few} == {"time", "input", "output", "out"}
    assert sum(name.startswith("output_blocks") for name in few) <= 2


def test_residuals_and_features_of_what_remains():
    """A ControlNet runs up to the branch, and a T2I-Adapter's maps from there on are not used."""
    unet = UNETS["sd"]
    net, given = ControlNet(unet, hint_channels=(4, 4)), inputs(unet)
    hint = jax.random.uniform(jax.random.key(2), (2, 16, 16, 3))
    params, own = random_params(unet, *given), random_params(net, *given, hint=hint)
    maps = tuple(
        jnp.full((2, 8 // size, 8 // size, channels), 0.3)
        for channels, size in feature_places(unet)[:2]
    )

    @jax.jit
    def outputs():
        apply, more = {"params": params}, dict(features=maps)
        residuals = net.apply({"params": own}, *given, hint=hint)
        few = net.apply({"params": own}, *given, hint=hint, branch=3)
        plain, deep = unet.apply(apply, *given, residuals=residuals, branch=3, **more)
        part = unet.apply(apply, *given, residuals=few, branch=3, deep=deep, **more)
        return residuals, few, plain, part[0]

    residuals, few, plain, part = outputs()
    assert len(residuals) == 7 and len(few) == 4
    for one, same in zip(few, residuals, strict=False):
        np.testing.assert_allclose(one, same, atol=1e-6)
    np.testing.assert_allclose(part, plain, atol=1e-5)


@pytest.mark.parametrize("branch", [6, -1])
def test_a_branch_that_is_none(branch):
    unet = UNETS["sd"]
    with pytest.raises(ValueError, match="cache_branch=-?[61]: this UNet has the branches 0…5"):
        jax.eval_shape(lambda: unet.init(jax.random.key(0), *inputs(unet), branch=branch))
