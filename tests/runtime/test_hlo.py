"""Traffic from the text of compiled programs: closed forms, in every notation of groups."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ldm_jax.runtime.hlo import traffic

LOOP = """HloModule jit_f, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%condition (state: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(50)
  %state = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (state.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state.1 = (s32[], /*index=1*/f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %x.1 = f32[8,4]{1,0} get-tuple-element(%state.1), index=1
  %sums = (f32[8,4]{1,0:T(8,128)}, bf16[16]{0}) all-reduce(%x.1, %x.1), GROUPS, to_apply=%sum
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%x.1)
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %start = (s32[], f32[8,4]{1,0}) tuple(%x)
  %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%condition, body=%body
  %out = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  ROOT %copy = f32[8,4]{1,0} copy(%out)
}
"""
GROUPS = {
    "replica_groups={{0,1,2,3},{4,5,6,7}}": 4,
    "replica_groups=[4,2]<=[2,2,2]T(2,1,0)": 2,
    "replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}": 8,
    "replica_groups=mesh['data'=4,'fsdp'=4] {'data':(2)2}": 2,
}


@pytest.mark.parametrize("groups", GROUPS)
def test_a_collective_in_a_loop(groups):
    members, size = GROUPS[groups], 8 * 4 * 4 + 16 * 2
    found = traffic(LOOP.replace("GROUPS", groups))
    assert found.sent == {"all-reduce": pytest.approx(50 * 2 * size * (members - 1) / members)}


@pytest.mark.parametrize("on_the_chip", [False, True])
def test_the_bytes_of_a_loop(on_the_chip):
    # all-reduce: result, and twice x; copy: result and operand; the condition: its compare.
    body, rest, condition = 160 + 2 * 128, 256, 1 + 4 + 4
    text, kept = LOOP, 0
    if on_the_chip:  # the first of the all-reduce's results, 128 bytes
        text, kept = LOOP.replace("T(8,128)}, bf16", "T(8,128)S(1)}, bf16"), 128
        assert text != LOOP
    assert traffic(text).main == 50 * (body - kept + condition) + rest


def test_of_a_sliced_array_the_slice_counts():
    text = """
%fused (p: f32[8,4], q: f32[8,4], i: s32[]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %i = s32[] parameter(2)
  %q = f32[8,4]{1,0} parameter(1)
  %part = f32[1,4]{1,0} dynamic-slice(%q, %i, %i)
  ROOT %put = f32[8,4]{1,0} dynamic-update-slice(%p, %part, %i, %i)
}

ENTRY %main (x: f32[8,4], i: s32[]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  ROOT %y = f32[8,4]{1,0} fusion(%x, %x, %i.1), kind=kLoop, calls=%fused
}
"""
    assert traffic(text).main == 16 + 16 + 4


@pytest.mark.parametrize(
    "kind, result, sent",
    [
        ("all-gather", "f32[32]{0}", 96),
        ("reduce-scatter", "f32[8]{0}", 96),
        ("all-to-all", "f32[32]{0}", 96),
        ("collective-permute", "f32[32]{0}", 128),
        ("all-gather-start", "(f32[8]{0}, f32[32]{0})", 96),
        ("collective-permute-start", "(f32[32]{0}, f32[32]{0})", 128),
        ("all-reduce-start", "f32[32]{0}", 192),
    ],
)
def test_kinds_of_collective(kind, result, sent):
    text = "ENTRY %main (x: f32[8]) -> f32[8] {\n"
    text += "  %x = f32[8]{0} parameter(0)\n"
    text += f"  ROOT %y = {result} {kind}(%x), replica_groups={{{{0,1,2,3}}}}\n}}\n"
    assert traffic(text).sent == {kind.removesuffix("-start"): pytest.approx(sent)}


def test_a_program_of_this_machine():
    """The gradient's all-reduce of data parallelism: all parameters once, over eight devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())

    def gradient(a, x):
        return jax.grad(lambda a: jnp.sum((x @ a) ** 2))(a)

    program = jax.jit(gradient, in_shardings=(whole, rows), out_shardings=whole)
    compiled = program.lower(jnp.zeros((16, 24)), jnp.zeros((32, 16))).compile()
    sent = traffic(compiled.as_text()).sent
    assert sent == {"all-reduce": pytest.approx(2 * 16 * 24 * 4 * 7 / 8)}


def test_a_scan_of_this_machine():
    def rounds(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=30)[0]

    text = jax.jit(rounds).lower(jnp.zeros((32, 32))).compile().as_text()
    # The product's operand or operands and result, and the sine's: four or five arrays a round.
    assert 4 * 30 <= traffic(text).main / (4 * 32 * 32) <= 5.1 * 30


def test_without_loops_it_is_what_xla_counts():
    a = jnp.zeros((256, 256))
    compiled = jax.jit(lambda a, b: jnp.sin(a @ b)).lower(a, a).compile()
    assert traffic(compiled.as_text()).main == compiled.cost_analysis()["bytes accessed"]
