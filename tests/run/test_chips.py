"""What a program asks of a chip, counted in programs whose needs are known."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import grouped
from grpo_jax.run import chips

HLO = """\
%adds (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input: bf16[64,32]) -> bf16[16,32] {
  %all-reduce.1 = bf16[64,32]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%adds
}

%body (state: (s32[], bf16[16,32])) -> (s32[], bf16[16,32]) {
  %gathered = bf16[64,32]{1,0:T(8,128)} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %others = f32[8]{0} all-gather(%z), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, dimensions={0}
  %scattered = bf16[16,32]{1,0} fusion(%gathered), kind=kCustom, calls=%all-reduce-scatter.1
}

%condition (state: (s32[], bf16[16,32])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(5)
  ROOT %compare = pred[] compare(%n, %constant.1), direction=LT
}

ENTRY %main (x: bf16[16,32]) -> bf16[16,32] {
  %loop = (s32[], bf16[16,32]) while(%start), condition=%condition, body=%body
  %total = (f32[8]{0}, f32[]) all-reduce(%a, %b), replica_groups=[2,4]<=[8], to_apply=%adds
}
"""


def test_collectives_are_counted_as_often_as_their_loops_turn():
    found = chips.collectives(types.SimpleNamespace(as_text=lambda: HLO))
    assert found == {
        "all-gather": (10, 5 * 64 * 32 * 2 * 3 / 4 + 5 * 32 / 2),
        "reduce-scatter": (5, 5 * 64 * 32 * 2 * 3 / 4),
        "all-reduce": (1, 36 * 2 * 3 / 4),
    }


WINDOWED = """\
%turn (state: (bf16[8,32], u32[], u32[])) -> (bf16[8,32], u32[], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %before = u32[]{:T(128)} get-tuple-element(%state), index=2
  %sent = (bf16[8,32]{1,0}, bf16[8,32]{1,0}, u32[]{:S(2)}) collective-permute-start(%part), source_target_pairs={{0,1}}
  %after = u32[]{:T(128)} add(%before, %two)
  ROOT %next = (bf16[8,32]{1,0}, u32[]{:T(128)}, u32[]{:T(128)}) tuple(%part, %other, %after)
}

%goes_on (state: (bf16[8,32], u32[], u32[])) -> pred[] {
  %last = u32[]{:T(128)} constant(8)
  %at = u32[]{:T(128)} get-tuple-element(%state), index=2
  ROOT %compare = pred[]{:T(512)} compare(%at, %last), direction=LT
}

ENTRY %main (x: bf16[8,32]) -> bf16[8,32] {
  %loop = (bf16[8,32]{1,0}, u32[]{:T(128)}, u32[]{:T(128)}) while(%start), condition=%goes_on, body=%turn
}
"""


def test_a_loop_that_counts_in_twos_turns_half_as_often():
    """So a product is divided whose results are summed over chips as they are computed."""
    found = chips.collectives(types.SimpleNamespace(as_text=lambda: WINDOWED))
    assert found == {"collective-permute": (4, 4 * 8 * 32 * 2)}


ASYNCHRONOUS = """\
%begins (x: bf16[8,32]) -> (bf16[8,32], bf16[32,32]) {
  %gather.1 = bf16[32,32] all-gather(%x), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="1"}
}

%goes_on (x: bf16[8,32]) -> (bf16[8,32], bf16[32,32]) {
  %gather.2 = bf16[32,32] all-gather(%x), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="1"}
}

%ends (x: bf16[8,32]) -> bf16[32,32] {
  %gather.3 = bf16[32,32] all-gather(%x), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="1"}
}

ENTRY %main (x: bf16[8,32]) -> bf16[32,32] {
  %begun = (bf16[8,32], bf16[32,32]) fusion(%x), kind=kCustom, calls=%begins
  %meanwhile = (bf16[8,32], bf16[32,32]) fusion(%begun), kind=kCustom, calls=%goes_on
  %ended = bf16[32,32] fusion(%meanwhile), kind=kCustom, calls=%ends
  %another = bf16[32,32] all-gather(%y), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="2"}
}
"""


def test_a_collective_beside_which_something_is_computed_is_one():
    found = chips.collectives(types.SimpleNamespace(as_text=lambda: ASYNCHRONOUS))
    assert found == {"all-gather": (2, 2 * 32 * 32 * 2 * 3 / 4)}


def test_groups_of_chips_in_a_form_that_is_not_known_are_no_groups_of_one():
    text = HLO.replace("replica_groups=[2,4]<=[8]", "replica_groups=all")
    with pytest.raises(ValueError, match=r"not told in a form that is known: %total = .* replica_groups=all"):
        chips.collectives(types.SimpleNamespace(as_text=lambda: text))


DECODING = """\
%of_a_layer (w: bf16[3,64,32], n: s32[]) -> bf16[64,32] {
  %w = bf16[3,64,32]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %cut = bf16[1,64,32]{2,1,0} dynamic-slice(%w, %n, %n, %n), dynamic_slice_sizes={1,64,32}
  ROOT %same = bf16[64,32]{1,0} bitcast(%cut)
}

%head (w: bf16[512,32]) -> bf16[512,32,1] {
  %w = bf16[512,32]{1,0} parameter(0)
  ROOT %same = bf16[512,32,1]{1,0,2} bitcast(%w)
}

%product (w: bf16[512,32], x: bf16[8,32]) -> f32[8,512] {
  %w = bf16[512,32]{1,0} parameter(0)
  %x = bf16[8,32]{1,0} parameter(1)
  %inner = bf16[512,32,1]{1,0,2} fusion(%w), kind=kLoop, calls=%head
  ROOT %found = f32[8,512]{1,0} convolution(%x, %inner), dim_labels=bf_oi0->bf
}

%write (cache: bf16[3,128,32], x: bf16[8,32], n: s32[]) -> (bf16[3,128,32], s32[]) {
  %cache = bf16[3,128,32]{2,1,0} parameter(0)
  %x = bf16[8,32]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %row = bf16[1,8,32]{2,1,0} bitcast(%x)
  %after = bf16[3,128,32]{2,1,0} dynamic-update-slice(%cache, %row, %n, %n, %n)
  ROOT %both = (bf16[3,128,32]{2,1,0}, s32[]) tuple(%after, %n)
}

%layers (state: (s32[], bf16[3,64,32], bf16[3,128,32])) -> (s32[], bf16[3,64,32], bf16[3,128,32]) {
  %state = (s32[], bf16[3,64,32]{2,1,0}, bf16[3,128,32]{2,1,0}) parameter(0)
  %n = s32[]{:S(6)} get-tuple-element(%state), index=0
  %w = bf16[3,64,32]{2,1,0} get-tuple-element(%state), index=1
  %cache = bf16[3,128,32]{2,1,0} get-tuple-element(%state), index=2
  %layer = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %n), kind=kLoop, calls=%of_a_layer
  %x = bf16[8,32]{1,0:S(1)} custom-call(%layer), custom_call_target="of the chip's own memory"
  %written = (bf16[3,128,32]{2,1,0}, s32[]{:S(6)}) fusion(%cache, %x, %n), kind=kLoop, calls=%write
  ROOT %next = (s32[], bf16[3,64,32]{2,1,0}, bf16[3,128,32]{2,1,0}) tuple(%n, %w, %cache)
}

%below_three (state: (s32[], bf16[3,64,32], bf16[3,128,32])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(3)
  ROOT %compare = pred[] compare(%n, %constant.1), direction=LT
}

%token (state: (s32[], bf16[512,32])) -> (s32[], bf16[512,32]) {
  %state = (s32[], bf16[512,32]{1,0}) parameter(0)
  %begun = (s32[], bf16[3,64,32]{2,1,0}, bf16[3,128,32]{2,1,0}) tuple(%state, %state, %state)
  %loop = (s32[], bf16[3,64,32]{2,1,0}, bf16[3,128,32]{2,1,0}) while(%begun), condition=%below_three, body=%layers
  %w = bf16[512,32]{1,0} get-tuple-element(%state), index=1
  %x = bf16[8,32]{1,0:S(1)} custom-call(), custom_call_target="of the chip's own memory"
  %logits = f32[8,512]{1,0} fusion(%w, %x), kind=kOutput, calls=%product
  %first = ((f32[8,512]{1,0}), f32[8,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%logits), slice={[0:8], [0:128]}
  %begin = (f32[8,512]{1,0:S(1)}, f32[8,512]{1,0}, u32[]{:S(2)}) copy-start(%logits)
  %copied = f32[8,512]{1,0:S(1)} copy-done(%begin)
  %some = f32[8,128]{1,0} slice(%logits), slice={[0:8], [0:128]}
  %put = f32[8,512]{1,0} dynamic-update-slice(%logits, %some, %n, %n)
  ROOT %next = (s32[], bf16[512,32]{1,0}) tuple(%n, %w)
}

%below_512 (state: (s32[], bf16[512,32])) -> pred[] {
  %constant.2 = s32[]{:T(128)} constant(512)
  ROOT %compare = pred[] compare(%n, %constant.2), direction=LT
}

ENTRY %main (x: bf16[512,32]) -> bf16[512,32] {
  %tokens = (s32[], bf16[512,32]{1,0}) while(%start), condition=%below_512, body=%token
}
"""


def test_a_turn_reads_what_its_instructions_do_and_of_what_is_cut_or_written_in_place_a_part():
    """Read and written are a layer of three, a row of the cache, the head, and logits of 8 x 512."""
    program = types.SimpleNamespace(as_text=lambda: DECODING)
    of_a_layer = 64 * 32 * 2 + 8 * 32 * 2
    assert chips.bytes_of_a_turn(program, 3) == of_a_layer
    logits, part = 8 * 512 * 4, 8 * 128 * 4
    assert chips.bytes_of_a_turn(program, 512) == 3 * of_a_layer + 512 * 32 * 2 + 2 * logits + (1 + 2 + 2) * part
    with pytest.raises(ValueError, match="no loop of the program turns 7 times"):
        chips.bytes_of_a_turn(program, 7)


def test_a_turn_of_a_program_that_runs_here_reads_a_layer_and_not_all_of_them():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    layers, D, N = 7, 256, 4
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((N, D), (layers, D, D)))
    found = chips.bytes_of_a_turn(jax.jit(f).lower(*shapes).compile(), layers)
    weights, rows = 4 * D * D, 4 * N * D
    # Cut from the others, which is a copy on a CPU, and multiplied; with a few passes over the rows.
    assert weights < found < 3 * weights + 10 * rows


def test_without_loops_it_is_what_xla_says():
    def f(x, w, v):
        return jax.nn.softmax(jnp.tanh(x @ w) @ v)

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((128, 256), (256, 512), (512, 64)))
    compiled = jax.jit(f).lower(*shapes).compile()
    bodies, entry = chips._computations(compiled.as_text())
    found = chips._accessed(bodies, {name: chips._instructions(lines) for name, lines in bodies.items()}, entry)
    np.testing.assert_allclose(found, compiled.cost_analysis()["bytes accessed"], rtol=0.02)


def test_products_are_counted_through_loops_and_recomputation():
    def f(x, w):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, w)[0])

    x, w = jnp.ones((4, 8)), jnp.ones((3, 8, 8))
    product = 2 * 4 * 8 * 8
    assert chips.flops(jax.make_jaxpr(f)(x, w).jaxpr) == 3 * product
    assert chips.flops(jax.make_jaxpr(jax.grad(f, argnums=(0, 1)))(x, w).jaxpr) == 3 * 4 * product
    unread = jax.make_jaxpr(lambda x, w: (f(x, w), jnp.zeros(3))[1])(x, w)
    assert chips.flops(unread.jaxpr) == 0


def test_products_of_what_runs_on_each_device_are_those_of_all():
    mesh = jax.sharding.AbstractMesh((4, 2), ("a", "b"))
    rows = jax.sharding.PartitionSpec("a")
    product = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    assert chips.flops(jax.make_jaxpr(product)(jnp.ones((8, 16))).jaxpr) == 8 * 2 * 2 * 2 * 16


@pytest.mark.parametrize(("N", "width"), [(8, 4), (256, 128)], ids=["small", "large"])
def test_products_of_groups_are_those_of_each_row_with_one_matrix(N, width):
    """Large ones go through loops on CPUs, which do not count: the program is a TPU's."""
    x, kernels = jnp.ones((N, 64)), jnp.ones((3, 64, width))
    sizes = jnp.array([N - 2, 2, 0])

    def f(x, kernels):
        return jnp.sum(jnp.sin(grouped.product(x, kernels, sizes)))

    product = 2 * N * 64 * width
    assert chips.flops(jax.make_jaxpr(f)(x, kernels).jaxpr, turns=100) == product
    assert chips.flops(jax.make_jaxpr(jax.grad(f, argnums=(0, 1)))(x, kernels).jaxpr, turns=100) == 3 * product


def test_what_takes_longest_bounds_a_program():
    chip = chips.CHIPS["v5p"]
    need = chips.Need(flops=459e12, memory=2765e9 / 2, sent={"all-gather": (3, 1200e9)})
    np.testing.assert_allclose(list(need.seconds(chip).values()), [1.0, 0.5, 2.0])
    assert "at least 2 s, bound by interconnect" in chips.table("learn", need, chip)


def test_an_unknown_chip_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'h100:1' is none of v5e, v5p, v6e"):
        chips.devices("h100:1", 1)


def test_without_the_compiler_of_tpus_it_is_named(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"grpo-jax\[tpu\]"):
        chips.devices("v5p:2x2x1", 4)
