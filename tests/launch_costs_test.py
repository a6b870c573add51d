"""FLOPs, traffic and collectives of programs whose numbers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nestax.launch import chips, costs, hlo

TURNS, M, K = 64, 16, 32


def layers(x, w):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def compiled(f, *args):
  return jax.jit(f).lower(*args).compile()


def entry(*lines, partitions=8):
  """A program of one computation."""
  head = (
    f'HloModule m, num_partitions={partitions}\n\nENTRY %main () -> f32[] {{'
  )
  return hlo.parse('\n'.join([head, *(f'  {line}' for line in lines), '}']))


def test_a_loop_counts_as_often_as_it_turns():
  x, w = jnp.zeros((M, K)), jnp.zeros((TURNS, K, K))
  made = compiled(jax.grad(lambda w, x: layers(x, w).sum()), w, x)
  cost = costs.costs(hlo.parse(made.as_text()))
  # forward, then both gradients but that of the first input
  assert cost.flops == 2 * M * K * K * 3 * TURNS
  assert cost.unknown == ()
  # every turn reads its own weights twice and writes their gradient, with
  # copies on the way; it does not touch the weights of all turns
  weights = TURNS * K * K * 4
  assert 3 * weights <= cost.traffic < TURNS / 2 * weights


def test_without_loops_it_is_what_xla_counts():
  x, w = jnp.zeros((M, K)), jnp.zeros((K, 3 * K))
  made = compiled(lambda x, w: x @ w, x, w)
  cost = costs.costs(hlo.parse(made.as_text()))
  xla = made.cost_analysis()
  assert cost.flops == xla['flops']
  np.testing.assert_allclose(cost.traffic, xla['bytes accessed'], rtol=0.05)


def test_a_sharded_product_gathers_its_weights():
  mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec('fsdp'))
  x = jax.ShapeDtypeStruct((64, K), jnp.float32, sharding=rows)
  w = jax.ShapeDtypeStruct((K, K), jnp.float32, sharding=rows)
  made = jax.jit(lambda x, w: x @ w, out_shardings=rows).lower(x, w).compile()
  cost = costs.costs(hlo.parse(made.as_text()))
  assert cost.sent['all-gather'] == 7 / 8 * K * K * 4
  assert cost.flops == 2 * (64 // 8) * K * K


def test_a_branch_is_the_dearest_or_the_cheapest():
  x, w = jnp.zeros((M, M)), jnp.zeros((M, M))

  def renew(due, x, w):
    return jax.lax.cond(due, lambda: x @ w @ w, lambda: x @ w)

  module = hlo.parse(compiled(renew, jnp.array(True), x, w).as_text())
  assert costs.costs(module).flops == 2 * 2 * M**3
  assert costs.costs(module, cheapest=True).flops == 2 * M**3


# A product over two axes at once, as TPUs' programs write it:
# [4, 2048, 2 * 24] @ [2 * 24, 6, 64], all but one axis of each spatial.
def test_a_product_written_as_a_convolution():
  module = entry(
    '%x = bf16[4,2048,2,24,1]{1,3,0,2,4} parameter(0)',
    '%w = bf16[2,24,6,64,1]{3,2,1,0,4} parameter(1)',
    'ROOT %y = bf16[4,2048,6,64,1]{1,3,4,2,0} convolution(%x, %w), '
    'window={size=1x6x2 pad=0_0x5_5x0_0 rhs_reversal=0x1x0}, '
    'dim_labels=0b2f1_2i1o0->0b1f2',
  )
  assert costs.costs(module).flops == 2 * 4 * 2048 * (2 * 24) * (6 * 64)


# A batch of 4 products [8, 16] @ [16, 5]: the batch is a spatial axis whose
# window meets one input only, the others being padding or dilation.
def test_a_batch_of_products_written_as_a_convolution():
  module = entry(
    '%x = f32[4,8,16]{2,1,0} parameter(0)',
    '%w = f32[4,16,5]{2,1,0} parameter(1)',
    'ROOT %y = f32[4,8,5]{2,1,0} convolution(%x, %w), '
    'window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf',
  )
  assert costs.costs(module).flops == 2 * 4 * 8 * 16 * 5


BYTES = 4 * 64


@pytest.mark.parametrize(
  'line, kind, sent',
  [
    ('all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}',
     'all-gather', 3 * BYTES),
    ('all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}',
     'all-gather', 3 * BYTES),
    ('reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%add',
     'reduce-scatter', 3 / 4 * BYTES),
    ('all-reduce(%x), replica_groups={}, to_apply=%add',
     'all-reduce', 2 * 7 / 8 * BYTES),
    ('all-to-all(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}',
     'all-to-all', BYTES / 2),
    ("all-gather(%x), replica_groups=mesh['a'=2,'b'=4], "
     "device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}",
     'all-gather', 3 * BYTES),
    ("all-reduce(%x), replica_groups=mesh['a'=4,'b'=2] {'a':(1)2,'b'}",
     'all-reduce', 2 * 3 / 4 * BYTES),
    ('all-reduce(%x), replica_groups={}, backend_config='
     '{"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}',
     'all-reduce', 2 * 7 / 8 * BYTES),
    # a step of one that was begun, and counted, elsewhere
    ('all-reduce(%x), replica_groups={}, backend_config='
     '{"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}',
     'all-reduce', 0.0),
    ('collective-permute(%x), source_target_pairs={{0,1},{1,0}}',
     'collective-permute', BYTES),
  ],
)  # fmt: skip
def test_what_a_collective_sends(line, kind, sent):
  module = entry('%x = f32[64]{0} parameter(0)', f'%y = f32[64]{{0}} {line}')
  found = costs.costs(module).sent
  assert found == dict.fromkeys(costs.KINDS, 0.0) | {kind: sent}


def test_a_fusion_that_keeps_a_slice_of_an_all_reduce_scatters():
  text = """HloModule m, num_partitions=4

%all-reduce-scatter (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  %all = f32[64]{0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %own = f32[16]{0} dynamic-slice(%all), dynamic_slice_sizes={16}
}

ENTRY %main (x: f32[64]) -> f32[16] {
  %x = f32[64]{0} parameter(0)
  ROOT %y = f32[16]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
}
"""
  sent = costs.costs(hlo.parse(text)).sent
  assert sent['reduce-scatter'] == 3 / 4 * 4 * 64
  assert sent['all-reduce'] == 0


def test_traffic_is_of_slices_and_of_main_memory_only():
  text = """HloModule m

%update (p0: f32[8,64], p1: f32[8,64], p2: f32[64]) -> f32[8,64] {
  %p0 = f32[8,64]{1,0} parameter(0)
  %p1 = f32[8,64]{1,0} parameter(1)
  %p2 = f32[64]{0} parameter(2)
  %row = f32[1,64]{1,0} dynamic-slice(%p1), dynamic_slice_sizes={1,64}
  %flat = f32[64]{0} bitcast(%row)
  %sum = f32[64]{0} add(%flat, %p2)
  %new = f32[1,64]{1,0} bitcast(%sum)
  ROOT %out = f32[8,64]{1,0} dynamic-update-slice(%p0, %new)
}

ENTRY %main (a: f32[8,64], b: f32[8,64], c: f32[64]) -> f32[8,64] {
  %a = f32[8,64]{1,0} parameter(0)
  %b = f32[8,64]{1,0} parameter(1)
  %c = f32[64]{0:T(128)S(1)} parameter(2)
  ROOT %y = f32[8,64]{1,0} fusion(%a, %b, %c), kind=kLoop, calls=%update
}
"""
  # a row read, a row written; %c is on the chip already
  assert costs.costs(hlo.parse(text)).traffic == 2 * 64 * 4


def test_traffic_is_of_slices_inside_fusions_in_fusions_too():
  text = """HloModule m

%row_of (q0: f32[64], q1: f32[8,64]) -> f32[64] {
  %q0 = f32[64]{0} parameter(0)
  %q1 = f32[8,64]{1,0} parameter(1)
  %row = f32[1,64]{1,0} dynamic-slice(%q1), dynamic_slice_sizes={1,64}
  %flat = f32[64]{0} bitcast(%row)
  ROOT %sum = f32[64]{0} add(%flat, %q0)
}

%put (r0: f32[8,64], r1: f32[64]) -> f32[8,64] {
  %r0 = f32[8,64]{1,0} parameter(0)
  %r1 = f32[64]{0} parameter(1)
  %new = f32[1,64]{1,0} bitcast(%r1)
  ROOT %out = f32[8,64]{1,0} dynamic-update-slice(%r0, %new)
}

%update (p0: f32[8,64], p1: f32[8,64], p2: f32[64]) -> f32[8,64] {
  %p0 = f32[8,64]{1,0} parameter(0)
  %p1 = f32[8,64]{1,0} parameter(1)
  %p2 = f32[64]{0} parameter(2)
  %added = f32[64]{0} fusion(%p2, %p1), kind=kLoop, calls=%row_of
  ROOT %all = f32[8,64]{1,0} fusion(%p0, %added), kind=kLoop, calls=%put
}

ENTRY %main (a: f32[8,64], b: f32[8,64], c: f32[64]) -> f32[8,64] {
  %a = f32[8,64]{1,0} parameter(0)
  %b = f32[8,64]{1,0} parameter(1)
  %c = f32[64]{0} parameter(2)
  ROOT %y = f32[8,64]{1,0} fusion(%a, %b, %c), kind=kLoop, calls=%update
}
"""
  # a row of %b and %c are read, a row is written
  assert costs.costs(hlo.parse(text)).traffic == 3 * 64 * 4


def test_a_kernel_counts_what_it_says():
  module = entry(
    '%x = f32[64]{0} parameter(0)',
    'ROOT %y = f32[64]{0} custom-call(%x), custom_call_target='
    '"tpu_custom_call", backend_config={"custom_call_config": {"body": "..",'
    ' "cost_estimate": {\n"bytes_accessed":5,\n"flops":1234,\n'
    '"transcendentals":0}, "needs_layout_passes": true}}',
  )
  assert costs.costs(module).flops == 1234


# of 8 by 8 blocks the lower triangle; of a window all that the grid has
@pytest.mark.parametrize(
  'kernel,grid,blocks,products',
  [
    ('mha_fwd_segmented_residuals', '1,8,8', 36, 2),
    ('mha_dq_no_residuals', '1,8,3', 24, 3),
    ('mqa_dkv_segmented_no_residuals', '1,3,8', 24, 4),
  ],
)
def test_attention_on_tpus_counts_its_blocks(kernel, grid, blocks, products):
  module = entry(
    '%x = f32[64]{0} parameter(0)',
    f'ROOT %splash_{kernel}.1 = f32[64]{{0}} custom-call(%x), '
    'custom_call_target="tpu_custom_call", operand_layout_constraints='
    f'{{s8[{grid}]{{2,1,0}}, s8[{grid}]{{2,1,0}}, bf16[2,6,4096,64]{{3,2,1,0}},'
    ' bf16[2,3,4096,64]{3,2,1,0}, s32[2,4096,128]{2,1,0}}, '
    'frontend_attributes={kernel_metadata={}}',
  )
  want = 2 * 64 * 2 * 6 * blocks * 512**2 * products
  assert costs.costs(module).flops == want


def test_the_longest_time_is_the_bound():
  peaks = chips.Peaks(100.0, 16.0, 10.0, 1.0)
  cost = costs.Costs()._replace(flops=100.0, traffic=20.0)
  times = chips.times(peaks, cost)
  assert times == (1.0, 2.0, 0.0) and times.bound == 'HBM'
  sent = dict.fromkeys(costs.KINDS, 1.0)
  assert chips.times(peaks, cost._replace(sent=sent)).bound == 'ICI'
  assert chips.peaks('v5e:4x4') == chips.PEAKS['v5e']
  assert chips.peaks('cpu:8') is None
  assert chips.peaks('cpu:8', ['1e12', '4', '5', '6']).flops == 1e12


@pytest.mark.parametrize('words', [['1'], list('123x'), list('1230')], ids=str)
def test_peaks_that_are_none_are_refused(words):
  with pytest.raises(ValueError, match='four numbers above 0'):
    chips.peaks('cpu:8', words)
