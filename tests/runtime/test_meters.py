"""FLOPs from a jaxpr: closed forms, loops, recomputation; and against XLA's count of a UNet."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from ldm_jax.models import attention, layers
from ldm_jax.models.dot_product import attend
from ldm_jax.models.unet import UNet
from ldm_jax.published import MODELS
from ldm_jax.runtime import meters
from ldm_jax.runtime.meters import memory_in_use, model_flops, rates
from tests.models.test_attention import plain

F32 = jnp.float32


def shape(*sides):
    return jax.ShapeDtypeStruct(sides, F32)


def conv(x, kernel, stride=1, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), options.pop("padding", "SAME"), dimension_numbers=numbers,
        **options,
    )  # fmt: skip


def test_a_product():
    assert model_flops(jnp.matmul, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
    assert model_flops(jnp.matmul, shape(4, 3, 5), shape(4, 5, 7)) == 2 * 4 * 3 * 5 * 7
    assert model_flops(lambda a, b: jnp.exp(a) + b, shape(9, 9), shape(9, 9)) == 0


def test_a_convolution_does_not_count_the_padding():
    # Of 8 places and 3 taps, 22 of 24 pairs lie inside.
    assert model_flops(conv, shape(2, 8, 8, 5), shape(3, 3, 5, 7)) == 2 * 2 * 22 * 22 * 5 * 7
    assert model_flops(conv, shape(2, 8, 8, 6), shape(1, 1, 6, 7)) == 2 * 2 * 64 * 6 * 7


def test_groups_of_channels():
    def grouped(x, kernel):
        return conv(x, kernel, feature_group_count=3, padding="VALID")

    assert model_flops(grouped, shape(1, 9, 9, 6), shape(2, 2, 2, 9)) == 2 * 64 * 4 * 2 * 9


@pytest.mark.parametrize("stride", [1, 2])
def test_a_gradient_costs_twice_the_forward_pass(stride):
    """By the input and by the kernel, each as much: the zeros of a dilation do not count."""

    def loss(x, kernel):
        return jnp.sum(conv(x, kernel, stride) ** 2)

    arguments = shape(2, 16, 16, 4), shape(3, 3, 4, 8)
    forward = model_flops(loss, *arguments)
    assert model_flops(jax.value_and_grad(loss, (0, 1)), *arguments) == 3 * forward > 0


def test_a_scan_counts_every_round():
    def powers(x, a):
        return lax.scan(lambda x, _: (x @ a, None), x, length=10)[0]

    once = 2 * 4 * 6 * 6
    assert model_flops(powers, shape(4, 6), shape(6, 6)) == 10 * once
    assert model_flops(jax.grad(lambda x, a: powers(x, a).sum(), 1), shape(4, 6), shape(6, 6)) == (
        30 * once  # forward, and the gradients by x and by a
    )


def test_the_dearer_branch_counts():
    def either(flag, x):
        return lax.cond(flag, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert model_flops(either, jax.ShapeDtypeStruct((), bool), shape(5, 5)) == 2 * 2 * 125


def layer(x, kernel):
    return jax.nn.silu(conv(jax.nn.gelu(x, approximate=False), kernel))


@pytest.mark.parametrize("policy", [None, "dots_saveable"])
def test_what_checkpoint_computes_again_does_not_count(policy):
    policy = policy and getattr(jax.checkpoint_policies, policy)
    again = jax.checkpoint(layer, policy=policy)

    def loss(of_layer, kernels):
        x = jnp.ones((2, 8, 8, 4))
        for kernel in kernels:
            x = of_layer(x, kernel)
        return jnp.sum(x**2)

    kernels = [shape(3, 3, 4, 4)] * 3
    plain = model_flops(jax.grad(lambda k: loss(layer, k)), kernels)
    assert model_flops(jax.grad(lambda k: loss(again, k)), kernels) == plain > 0


def test_different_products_of_equal_shape_count_apart():
    def products(a, b, c):
        return a @ b + a @ c + jax.jit(jnp.matmul)(a, b)

    assert model_flops(products, *[shape(4, 4)] * 3) == 2 * 2 * 64


def test_a_map_over_devices_counts_all_of_them():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(
        lambda x, a: x @ a, mesh=mesh, in_specs=(rows, jax.sharding.PartitionSpec()), out_specs=rows
    )
    assert model_flops(mapped, shape(8, 6), shape(6, 5)) == 2 * 8 * 6 * 5


def test_a_unet_as_xla_counts_it():
    """XLA also counts additions, divisions and the like, a few percent of a network this wide."""
    unet = UNet(
        in_channels=4,
        out_channels=4,
        model_channels=128,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_head_channels=64,
        context_dim=256,
    )
    x, t, context = jnp.zeros((2, 16, 16, 4)), jnp.zeros(2), jnp.zeros((2, 77, 256))
    params = jax.eval_shape(lambda: unet.init(jax.random.key(0), x, t, context))

    def loss(params):
        return jnp.mean(unet.apply(params, x, t, context) ** 2)

    for function in (loss, jax.grad(loss)):
        counted = model_flops(function, params)
        xla = jax.jit(function).lower(params).cost_analysis()["flops"]
        assert 0.93 < counted / xla <= 1.0


def test_rates():
    known, unknown = (types.SimpleNamespace(device_kind=kind) for kind in ("TPU v5p", "cpu"))
    assert rates(8e12, 2.0, [unknown] * 4) == {"tflops": 1.0}
    assert rates(4 * 459e12, 2.0, [known] * 4) == {"tflops": 229.5, "mfu": 0.5}


def test_memory_in_use():
    device = types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3e9})
    silent = types.SimpleNamespace(memory_stats=lambda: None)
    assert memory_in_use([silent, device]) == {"memory_gb": 3.0}
    assert memory_in_use([silent]) == {}


def test_a_chip_has_one_row():
    rows = {}
    for chip in meters.CHIPS.values():
        assert rows.setdefault((chip.name, chip.memory), chip) == chip


@pytest.mark.long
def test_the_unet_of_stable_diffusion_as_xla_counts_it(monkeypatch):
    """0.78 TFLOP forward for a picture of 512 pixels, and three times as much with the gradient."""
    unet = UNet(**MODELS["sd1"].unet)
    x, t, context = jnp.zeros((1, 64, 64, 4)), jnp.zeros(1), jnp.zeros((1, 77, 768))
    params = jax.eval_shape(lambda: unet.init(jax.random.key(0), x, t, context))

    def loss(params):
        return jnp.mean(unet.apply(params, x, t, context) ** 2)

    ours = [model_flops(function, params) for function in (loss, jax.grad(loss))]
    assert ours == pytest.approx([0.7818e12, 2.3422e12], rel=1e-4)
    monkeypatch.setattr(attention, "attend", plain)  # XLA counts a loop's body once
    monkeypatch.setattr(layers, "FEWEST_PIXELS", 10**9)  # and a CPU has fewer products
    for function, counted in zip((loss, jax.grad(loss)), ours, strict=True):
        xla = jax.jit(lambda p, function=function: function(p)).lower(params)
        assert 0.985 < counted / xla.cost_analysis()["flops"] <= 1.0


def test_what_the_gradient_of_attention_computes_again_does_not_count():
    """Value: two products of 2·B·heads·L·S·d; gradient: four."""
    shapes = [jax.ShapeDtypeStruct((2, n, 4, 8), jnp.float32) for n in (16, 24, 24)]
    product = 2 * 2 * 4 * 16 * 24 * 8
    gradient = jax.grad(lambda *a: jnp.sum(attend(*a)), (0, 1, 2))
    assert model_flops(attend, *shapes) == 2 * product
    assert model_flops(gradient, *shapes) == 6 * product
