"""Programs' texts as compilers write them, cut to what is read."""

import pytest

from nestax.launch import hlo

LAYERS = 5

# A loop over layers with a loop inside it, as TPUs' programs look: no note of
# the turns, a counter that goes up by two, layouts with memory spaces.
TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=16

%windowed_body (p.1: (bf16[8,16], u32[])) -> (bf16[8,16], u32[]) {
  %p.1 = (bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) parameter(0)
  %shard = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.1), index=0
  %send = (bf16[8,16]{1,0}, bf16[8,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%shard), source_target_pairs={{0,1},{1,0}}
  %sent = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%send)
  %at = u32[]{:T(128)} get-tuple-element(%p.1), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%at, %two)
  ROOT %t.1 = (bf16[8,16]{1,0}, /*index=1*/u32[]) tuple(%sent, %next)
}

%windowed_condition (p.2: (bf16[8,16], u32[])) -> pred[] {
  %p.2 = (bf16[8,16]{1,0}, u32[]{:T(128)}) parameter(0)
  %limit = u32[]{:T(128)} constant(8)
  %now = u32[]{:T(128)} get-tuple-element(%p.2), index=1
  ROOT %less = pred[]{:T(512)} compare(%now, %limit), direction=LT
}

%layer (p.3: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p.3 = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  %one = s32[]{:T(128)} constant(1)
  %m = s32[]{:T(128)} add(%n, %one)
  %x = bf16[8,16]{1,0} get-tuple-element(%p.3), index=1
  %zero = u32[]{:T(128)} constant(0)
  %start = (bf16[8,16]{1,0}, u32[]) tuple(%x, %zero)
  %ring = (bf16[8,16]{1,0}, u32[]) while(%start), \
condition=%windowed_condition, body=%windowed_body
  %y = bf16[8,16]{1,0} get-tuple-element(%ring), index=0
  ROOT %t.3 = (s32[], bf16[8,16]{1,0}) tuple(%m, %y)
}

%wrapped (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %is_less = pred[] compare(%a, %b), direction=LT
}

%layer_condition (p.4: (s32[], bf16[8,16])) -> pred[] {
  %p.4 = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.4), index=0
  %layers = s32[] constant(5)
  ROOT %goes_on = pred[] fusion(%i, %layers), kind=kLoop, calls=%wrapped
}

ENTRY %main (given: bf16[8,16]) -> bf16[8,16] {
  %given = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0), sharding={devices=[16]}
  %first = s32[] constant(0)
  %begin = (s32[], bf16[8,16]{1,0}) tuple(%first, %given)
  %loop = (s32[], bf16[8,16]{1,0}) while(%begin), condition=%layer_condition, \
body=%layer, metadata={op_name="jit(step)/while"}
  ROOT %end = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def find(module, name):
  return next(
    (body, body.instructions[name])
    for body in module.computations.values()
    if name in body.instructions
  )


def test_a_text_is_read():
  module = hlo.parse(TEXT)
  assert (module.entry, module.devices) == ('%main', 16)
  assert len(module.computations) == 6
  _, send = find(module, '%send')
  assert send.opcode == 'collective-permute-start'
  assert send.operands == ('%shard',)
  assert [a.shape for a in send.arrays] == [(8, 16), (8, 16), (), ()]
  assert [a.space for a in send.arrays] == [0, 0, 2, 2]
  assert send.arrays[0].bytes == 2 * 8 * 16
  assert find(module, '%shard')[1].arrays[0].space == 1
  assert module.computations['%layer'].root == '%t.3'


@pytest.mark.parametrize(
  'name, turns', [('%ring', 4), ('%loop', LAYERS)], ids=['by two', 'fused']
)
def test_turns_are_read_off_the_loop(name, turns):
  module = hlo.parse(TEXT)
  assert hlo.trips(module, *find(module, name)) == turns


def test_the_compilers_note_counts_and_what_cannot_be_read_is_said():
  noted = TEXT.replace(
    'body=%layer,', 'body=%layer, backend_config={"known_trip_count":{"n":"7"}}'
  )
  module = hlo.parse(noted)
  assert hlo.trips(module, *find(module, '%loop')) == 7
  for old, new in (
    ('%zero = u32[]{:T(128)} constant(0)', '%zero = u32[] copy(%n)'),
    ('%limit = u32[]{:T(128)} constant(8)', '%limit = u32[] copy(%now)'),
    ('add(%at, %two)', 'multiply(%at, %two)'),
  ):
    assert old in TEXT
    module = hlo.parse(TEXT.replace(old, new))
    assert hlo.trips(module, *find(module, '%ring')) is None


def test_what_is_no_program_is_refused():
  with pytest.raises(hlo.HloError, match='no ENTRY'):
    hlo.parse('HloModule empty\n')
