# ruff: noqa: E501 (an instruction of a program is one line)
import pytest

from gptjax.compiler.hlo import Program, parse_shapes, shape_bytes

LOOP = """HloModule loop

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %state = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8]{{0}} get-tuple-element(%state), index=1
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %double = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%doubling, backend_config={{"estimated_cycles":"100"}}
  ROOT %out = (s32[], f32[8]{{0}}) tuple(%next, %double)
}}

%doubling (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  ROOT %sum = f32[8]{{0}} add(%a, %a)
}}

%condition (state: (s32[], f32[8])) -> pred[] {{
  %state = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant({limit})
  ROOT %less = pred[] compare(%i, %limit), direction={direction}
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %start = s32[] constant({start})
  %first = (s32[], f32[8]{{0}}) tuple(%start, %x)
  %loop = (s32[], f32[8]{{0}}) while(%first), condition=%condition, body=%body{config}
  ROOT %y = f32[8]{{0}} get-tuple-element(%loop), index=1
}}
"""


def loop(start=0, limit=12, step=1, direction="LT", config=""):
  return Program(
    LOOP.format(start=start, limit=limit, step=step, direction=direction, config=config)
  )


@pytest.mark.parametrize(
  ("start", "limit", "step", "times"),
  [(0, 12, 1, 12), (2, 12, 1, 10), (0, 12, 4, 3), (1, 12, 4, 3), (5, 5, 1, 0), (7, 5, 1, 0)],
)
def test_a_loop_runs_from_its_start_in_steps_up_to_its_limit(start, limit, step, times):
  program = loop(start, limit, step)
  assert program.runs["body"] == program.runs["doubling"] == times
  assert program.unknown_loops == []


def test_the_cycles_of_a_loop_count_as_often_as_it_runs():
  assert loop().cycles() == {"main": 0, "body": 1200, "condition": 0}


def test_a_loop_whose_length_is_written_down_needs_no_reading():
  known = loop(direction="NE", config=', backend_config={"known_trip_count":{"n":"9"}}')
  assert known.runs["body"] == 9
  assert known.unknown_loops == []


def test_a_loop_that_cannot_be_read_counts_once_and_is_named():
  program = loop(direction="NE")
  assert program.runs["body"] == 1
  assert program.unknown_loops == ["loop"]


def known(times):
  return f'backend_config={{"known_trip_count":{{"n":"{times}"}}}}'


NESTED = f"""HloModule nested

%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}

%inner (s: (f32[256])) -> (f32[256]) {{
  %s = (f32[256]{{0}}) parameter(0)
  %v = f32[256]{{0}} get-tuple-element(%s), index=0
  %all-reduce.1 = f32[256]{{0}} all-reduce(%v), channel_id=1, replica_groups={{{{0,1,2,3}}}}, to_apply=%sum, metadata={{op_name="jit(step)/grads"}}
  ROOT %t = (f32[256]{{0}}) tuple(%all-reduce.1)
}}

%outer (s: (f32[256])) -> (f32[256]) {{
  %s = (f32[256]{{0}}) parameter(0)
  ROOT %again = (f32[256]{{0}}) while(%s), condition=%never, body=%inner, {known(5)}
}}

%never (s: (f32[256])) -> pred[] {{
  %s = (f32[256]{{0}}) parameter(0)
  ROOT %no = pred[] constant(false)
}}

ENTRY %main (x: f32[256]) -> (f32[256]) {{
  %x = f32[256]{{0}} parameter(0)
  %first = (f32[256]{{0}}) tuple(%x)
  ROOT %loop = (f32[256]{{0}}) while(%first), condition=%never, body=%outer, {known(3)}
}}
"""


def test_loops_in_loops_multiply():
  program = Program(NESTED)
  assert program.runs["inner"] == 15
  (found,) = program.collectives(devices=64)
  assert (found.kind, found.count, found.group) == ("all-reduce", 15, 4)
  # A ring sends each byte twice, but for the device's own quarter.
  assert found.bytes == 15 * 2 * 1024 * 3 / 4
  assert (found.op_name, found.computation) == ("jit(step)/grads", "inner")
  assert not found.asynchronous


def collective(line, devices=8):
  """The only collective of a program with this line."""
  text = f"HloModule one\n\nENTRY %main (x: bf16[64]) -> bf16[64] {{\n{line}\n}}\n"
  (found,) = Program(text).collectives(devices)
  return found


@pytest.mark.parametrize(
  ("groups", "size"),
  [
    ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2),
    ("replica_groups=[2,4]<=[8]", 4),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
    ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}", 4),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
    ("replica_groups={}", 8),
    ("dimensions={0}", 8),
  ],
)
def test_every_notation_of_groups(groups, size):
  found = collective(f"  %g = bf16[64]{{0}} all-gather(%x), {groups}, dimensions={{0}}")
  assert found.group == size
  assert found.bytes == 128 * (size - 1) / size


@pytest.mark.parametrize(
  ("line", "kind", "sent"),
  [
    # (operand, result), several of each, and with the context of a TPU's.
    ("(bf16[8]{0}, bf16[64]{0}) all-gather-start(%x)", "all-gather", 128 * 7 / 8),
    ("(bf16[8]{0}, bf16[64]{0}, u32[], u32[]) all-gather-start(%x)", "all-gather", 128 * 7 / 8),
    (
      "((bf16[8]{0}, f32[8]{0}), (bf16[64]{0}, f32[64]{0})) all-gather-start(%x, %y)",
      "all-gather",
      384 * 7 / 8,
    ),
    # Of a reduction, either the results alone or operands and results.
    ("f32[64]{0} all-reduce-start(%x)", "all-reduce", 2 * 256 * 7 / 8),
    ("(f32[64]{0}, f32[64]{0}) all-reduce-start(%x, %y)", "all-reduce", 2 * 512 * 7 / 8),
    ("((f32[64]{0}), f32[64]{0}) all-reduce-start(%x)", "all-reduce", 2 * 256 * 7 / 8),
    ("((f32[64]{0}), f32[8]{0}) reduce-scatter-start(%x)", "reduce-scatter", 256 * 7 / 8),
    (
      "(f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%x)",
      "collective-permute",
      256,
    ),
    ("((f32[64]{0}), f32[64]{0}) all-to-all-start(%x)", "all-to-all", 256 * 7 / 8),
  ],
)
def test_an_asynchronous_pair_sends_its_data_once(line, kind, sent):
  done = f"\n  %done = f32[64]{{0}} {kind}-done(%start)"
  found = collective(f"  %start = {line}, replica_groups={{}}, dimensions={{0}}{done}")
  assert (found.kind, found.bytes, found.asynchronous) == (kind, sent, True)


def test_a_pair_with_nothing_between_is_not_asynchronous():
  config = 'backend_config={"collective_backend_config":{"is_sync":true}}'
  found = collective(f"  %s = (bf16[8]{{0}}, bf16[64]{{0}}) all-gather-start(%x), {config}")
  assert not found.asynchronous


@pytest.mark.parametrize(
  ("line", "sent"),
  [
    ("bf16[8]{0} reduce-scatter(%x), replica_groups=[1,8]<=[8]", 8 * 16 * 7 / 8),
    ("bf16[64]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", 128),
  ],
)
def test_what_the_others_send(line, sent):
  assert collective(f"  %c = {line}").bytes == sent


FUSED = """HloModule fused

%pieces.1 (a: bf16[8]) -> bf16[64] {
  %a = bf16[8]{0} parameter(0)
  ROOT %all-gather.1 = bf16[64]{0} all-gather(%a), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

%pieces.2 (a: bf16[8]) -> bf16[64] {
  %a = bf16[8]{0} parameter(0)
  ROOT %all-gather.2 = bf16[64]{0} all-gather(%a), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{}}
}

%all-reduce-scatter (a: f32[64]) -> f32[8] {
  %a = f32[64]{0} parameter(0)
  %all-reduce = f32[64]{0} all-reduce(%a), channel_id=8, replica_groups=[1,8]<=[8], to_apply=%sum
  ROOT %slice = f32[8]{0} slice(%all-reduce), slice={[0:8]}
}

%unused (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  ROOT %all-reduce.9 = f32[64]{0} all-reduce(%a), channel_id=9, replica_groups=[1,8]<=[8]
}

ENTRY %main (x: bf16[8], y: f32[64]) -> bf16[64] {
  %x = bf16[8]{0} parameter(0)
  %y = f32[64]{0} parameter(1)
  %f1 = bf16[64]{0} fusion(%x), kind=kCustom, calls=%pieces.1
  %f2 = bf16[64]{0} fusion(%x), kind=kCustom, calls=%pieces.2
  %f3 = f32[8]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter
  ROOT %r = bf16[64]{0} add(%f1, %f2)
}
"""


def test_a_collective_in_fused_pieces_counts_once():
  gather, scatter = Program(FUSED).collectives(devices=8)
  assert (gather.kind, gather.count, gather.bytes) == ("all-gather", 1, 128 * 7 / 8)
  assert (gather.computation, scatter.computation) == ("main", "main")
  # What is reduced on all devices in order to keep a part: half of an all-reduce is sent.
  assert (scatter.kind, scatter.bytes) == ("reduce-scatter", 256 * 7 / 8)


KERNEL = """HloModule kernel

ENTRY %main (q: bf16[4,128,64], n: s32[4]) -> bf16[4,128,64] {
  %q = bf16[4,128,64]{2,1,0} parameter(0)
  %n = s32[4]{0} parameter(1)
  %k = bf16[4,128,64]{2,1,0:T(8,128)(2,1)} custom-call(%n, %q, %q), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[4]{0}, bf16[4,128,64]{2,1,0}, f32[4,128]{1,0}}, metadata={op_name="jit(step)/splash_fwd/pallas_call"}, backend_config={"custom_call_config":{"body":"x"}, "metadata":"{
    block_q: 512,
    note: a %name = that looks like one
  }"}
  %other = bf16[4,128,64]{2,1,0} custom-call(%q), custom_call_target="Sharding"
  ROOT %r = bf16[4,128,64]{2,1,0} add(%k, %other)
}
"""


def test_a_kernel_is_read_with_all_that_is_written_about_it():
  program = Program(KERNEL)
  (kernel,) = program.kernels()
  assert (kernel.name, kernel.count, kernel.computation) == ("splash_fwd", 1, "main")
  assert kernel.operands == ((4, 128, 64), (4, 128))
  assert "block_q: 512" in kernel.metadata
  assert [i.name for i in program.computations["main"]] == ["q", "n", "k", "other", "r"]


def test_a_kernel_without_an_origin_has_the_name_of_its_instruction():
  text = KERNEL.replace("jit(step)/splash_fwd/pallas_call", "")
  assert [kernel.name for kernel in Program(text).kernels()] == ["k"]


def test_the_largest_arrays_are_those_in_device_memory():
  text = """HloModule buffers

ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  %a = f32[512]{0} copy(%x), metadata={op_name="jit(f)/a"}
  %again = f32[512]{0} copy(%x), metadata={op_name="jit(f)/a"}
  %chip = f32[4096]{0:T(1024)S(1)} copy(%x), metadata={op_name="jit(f)/chip"}
  ROOT %b = (f32[128]{0}, bf16[128]{0}) fusion(%a), kind=kLoop, metadata={op_name="jit(f)/b"}
}
"""
  assert Program(text).largest_buffers(5) == [
    (2048, "f32[512]", "jit(f)/a"),
    (512, "f32[128]", "jit(f)/b"),
    (256, "bf16[128]", "jit(f)/b"),
  ]


@pytest.mark.parametrize(
  ("shape", "size"),
  [
    ("f32[]", 4),
    ("bf16[3,5]{1,0}", 30),
    ("pred[7]", 7),
    ("(s32[2], u8[3]{0}, token[])", 11),
    ("f8e4m3fn[16]", 16),
    ("s4[16]", 8),
    ("f32[0,5]", 0),
  ],
)
def test_bytes_of_a_shape(shape, size):
  assert shape_bytes(shape) == size


def test_shapes_of_floats_alone():
  assert parse_shapes("s32[4]{0}, bf16[2,3]{1,0}, pred[8], f32[]") == [(2, 3), ()]


@pytest.mark.parametrize(
  "written",
  [
    "s32[] %which, branch_computations={%first, %second}",
    "pred[] %which, true_computation=%first, false_computation=%second",
  ],
)
def test_the_branches_of_a_condition_are_read_however_they_are_written(written):
  kind, _, rest = written.partition(" ")
  operand, _, branches = rest.partition(", ")
  program = Program(f"""HloModule condition

%first (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  ROOT %one = f32[8]{{0}} custom-call(%a), custom_call_target="one"
}}

%second (b: f32[8]) -> f32[8] {{
  %b = f32[8]{{0}} parameter(0)
  ROOT %two = f32[8]{{0}} custom-call(%b), custom_call_target="two"
}}

ENTRY %main (which: {kind}, x: f32[8]) -> f32[8] {{
  %which = {kind} parameter(0)
  %x = f32[8]{{0}} parameter(1)
  ROOT %y = f32[8]{{0}} conditional({operand}, %x, %x), {branches}
}}
""")
  calls = [i.attribute("custom_call_target") for _, i, _ in program.steps()]
  assert sorted(filter(None, calls)) == ["one", "two"]
