import numpy as np
import pytest

from gptjax.compiler.estimate import KERNEL_EFFICIENCY, estimate, kernel_flops, visited_fraction
from gptjax.compiler.hlo import Kernel, Program
from gptjax.compiler.topology import GENERATIONS, Slice
from gptjax.devices.chips import find_chip
from gptjax.devices.sharding import ring_of_box

V5E = GENERATIONS["v5e"]


class Chip:
  def __init__(self, *coords):
    self.coords = coords


def make_slice(*shape, generation=V5E):
  chips = [Chip(*cell) for cell in np.ndindex(*shape)]
  return Slice("test", shape, 1, chips, find_chip("TPU v5 lite"), generation)


@pytest.mark.parametrize(
  ("length", "block", "window", "share"),
  [
    (2048, 2048, None, 1),
    (2048, 1024, None, 3 / 4),
    (2048, 512, None, 10 / 16),
    (2048, 512, 1, 4 / 16),  # the diagonal
    (2048, 512, 2, 7 / 16),  # and the last key of the block before
    (2048, 512, 513, 7 / 16),
    (2048, 512, 514, 9 / 16),
  ],
)
def test_blocks_that_nobody_sees_are_not_visited(length, block, window, share):
  assert visited_fraction(length, block, block, window) == share


def test_a_kernel_counts_its_products_on_the_blocks_it_visits():
  rows, heads, length, width = 2, 4, 2048, 128
  shapes = ((rows, heads, length, width),) * 3
  sizes = r"{\"block_q\": 1024, \"block_kv\": 1024, \"block_q_dkv\": 512, \"block_kv_dkv\": 512}"
  product = 2.0 * rows * heads * length**2 * width
  forward = Kernel("splash_mha_fwd_segmented", 1, "main", shapes, sizes)
  assert kernel_flops(forward, (None,), one_pass=True) == 2 * product * 3 / 4
  backward = Kernel("splash_mha_dkv_segmented", 1, "main", shapes, sizes)
  assert kernel_flops(backward, (None,), one_pass=True) == 5 * product * 10 / 16
  assert kernel_flops(backward, (None,), one_pass=False) == 4 * product * 10 / 16
  # A model of which every second layer sees a window of 256.
  assert kernel_flops(backward, (None, 256), one_pass=True) == 5 * product * (10 + 7) / 32
  assert kernel_flops(Kernel("other", 1, "main", (), ""), (None,), one_pass=True) == 0


def test_a_kernel_of_experts_counts_the_rows_in_use():
  rows, kernels = (1024, 256), (8, 256, 512)
  product = 2 * 1024 * 256 * 512
  forward = Kernel("gmm", 1, "main", (rows, kernels), "")
  assert kernel_flops(forward, (None,), one_pass=True) == product
  assert kernel_flops(forward, (None,), one_pass=True, expert_rows=0.25) == product / 4
  sums = Kernel("tgmm", 1, "main", (rows, (1024, 512)), "")
  assert kernel_flops(sums, (None,), one_pass=True) == product


def test_a_kernel_over_pages_counts_one_query_a_row_and_reads_them_all():
  queries, pages = (8, 4, 128), (1024, 16, 8, 128)
  kernel = Kernel("ragged_paged_attention_kernel", 1, "main", (queries, pages), "")
  assert kernel_flops(kernel, (None, 64), one_pass=True) == 2 * 2 * 4 * 128 * 1024 * 16


PAGES = """
ENTRY %main (q: bf16[8,4,128]) -> bf16[8,4,128] {
  %q = bf16[8,4,128]{2,1,0} parameter(0)
  %pages = bf16[1024,16,8,128]{3,2,1,0} parameter(1)
  ROOT %k = bf16[8,4,128]{2,1,0} custom-call(%q, %pages), custom_call_target="tpu_custom_call", \
operand_layout_constraints={bf16[8,4,128]{2,1,0}, bf16[1024,16,8,128]{3,2,1,0}}, \
metadata={op_name="jit(f)/ragged_paged_attention_kernel/pallas_call"}
}
"""


def test_a_kernel_that_reads_more_than_it_computes_takes_the_time_of_reading():
  target = make_slice(2, 2)
  found = estimate(Program(PAGES), target, target.devices, (None,), [])
  moved = 2 * (1024 * 16 * 8 * 128 + 2 * 8 * 4 * 128)
  assert found.seconds == found.kernels
  assert found.kernels == pytest.approx(moved / 819e9 / KERNEL_EFFICIENCY)
  assert found.kernel_flops == 2 * 2 * 4 * 128 * 1024 * 16


WEIGHTS = """
ENTRY %main (w: bf16[4096,4096]) -> bf16[8,4096] {
  %w = bf16[4096,4096]{1,0} parameter(0)
  %copy-start = (bf16[4096,4096]{1,0:S(1)}, bf16[4096,4096]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %copy-done = bf16[4096,4096]{1,0:S(1)} copy-done(%copy-start)
  %x = bf16[8,4096]{1,0:S(1)} fusion(%copy-done), kind=kOutput, calls=%f, \
backend_config={"estimated_cycles":"CYCLES"}
  ROOT %y = bf16[8,4096]{1,0} fusion(%x, %w), kind=kOutput, calls=%g, \
backend_config={"estimated_cycles":"10000"}
}
"""


@pytest.mark.parametrize("cycles", [20_000, 70_000])
def test_products_wait_for_copies_of_their_weights(cycles):
  target = make_slice(2, 2)
  program = Program(WEIGHTS.replace("CYCLES", str(cycles)))
  # The second product reads a part of the weights itself, as long as it runs.
  copied, read = 2 * 4096**2 / 819e9, 10_000 / 1.5e9
  found = estimate(program, target, target.devices, (None,), [])
  assert found.fused == pytest.approx(max(copied + read, (cycles + 10_000) / 1.5e9))
  assert found.seconds == found.fused


def test_neighbours_on_a_ring_share_no_link():
  cells = ring_of_box((4, 4))
  forward = list(zip(cells, cells[1:] + cells[:1], strict=True))
  assert make_slice(4, 4).busiest_link(forward) == 1


def test_messages_that_cross_share_links():
  target = make_slice(4, 4)
  # From one end of a row to the other, past the two in between that send to their neighbours.
  assert target.busiest_link([((0, 0), (0, 3)), ((0, 1), (0, 2)), ((0, 2), (0, 3))]) == 2
  # The other way is another link.
  assert target.busiest_link([((0, 0), (0, 1)), ((0, 1), (0, 0))]) == 1


def test_a_long_dimension_is_a_ring():
  ends = [((0, 0), (0, 15)), ((0, 0), (0, 1))]
  assert make_slice(1, 16).busiest_link(ends) == 1  # one wraps around
  assert make_slice(1, 8).busiest_link([((0, 0), (0, 7)), ((0, 0), (0, 1))]) == 2


PROGRAM = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %gather-start = (f32[SIZE], f32[SIZE]) all-gather-start(%x), replica_groups=[1,16]<=[16]
  %work = f32[8] fusion(%x), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"1500000"}
  %gather-done = f32[SIZE] all-gather-done(%gather-start)
  ROOT %out = (s32[], f32[8]) tuple(%next, %work)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]) tuple(%zero, %a)
  %loop = (s32[], f32[8]) while(%start), condition=%condition, body=%body
  %reduce = f32[6000000] all-reduce(%a), replica_groups=[1,16]<=[16]
  ROOT %r = f32[8] get-tuple-element(%loop), index=1
}
"""
LINKS = 2 * V5E.link_bytes_per_second  # a 4x4 slice has no rings: one link a dimension


@pytest.mark.parametrize(("elements", "longer"), [(1_000, False), (48_000_000, True)])
def test_what_a_loop_hides_is_not_added(elements, longer):
  target = make_slice(4, 4)
  program = Program(PROGRAM.replace("SIZE", str(elements)))
  found = estimate(program, target, target.devices, (None,), program.collectives(16))
  assert found.fused == pytest.approx(3 * 1e-3)  # 3 x 1.5 million cycles at 1.5 GHz
  waiting = 2 * 15 / 16 * 4 * 6e6 / LINKS
  hidden = 3 * 15 / 16 * 4 * elements / LINKS
  exposed = waiting + (hidden - 3 * 1e-3 if longer else 0)
  assert found.exposed == pytest.approx(exposed)
  assert found.collectives == pytest.approx(waiting + hidden)
  assert found.seconds == pytest.approx(found.fused + found.exposed)
  assert found.kernels == 0
  assert 0 < KERNEL_EFFICIENCY < 1
