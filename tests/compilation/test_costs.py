"""Costs of a program written by hand, against figures worked out by hand."""
# ruff: noqa: E501

import pytest

from zegformer_jax.compilation import hlo
from zegformer_jax.compilation.costs import operations

PROGRAM = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/me/zegformer_jax/training/step.py"
2 "/usr/lib/site-packages/flax/linen/linear.py"

FunctionNames
1 "train_step"
2 "Dense.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=9}
2 {file_name_id=2 function_name_id=2 line=30 end_line=30 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%layer (a: bf16[16,64], b: bf16[6,64,32], i: s32[]) -> bf16[16,32] {
  %a = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[6,64,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  %i = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,64,32]{2,1,0} dynamic-slice(%b, %i, %zero, %zero), dynamic_slice_sizes={1,64,32}
  %kernel = bf16[64,32]{1,0} bitcast(%slice)
  ROOT %product = bf16[16,32]{1,0} convolution(%a, %kernel), dim_labels=bf_io->bf
}

%body (state: (s32[], bf16[16,64], bf16[6,64,32])) -> (s32[], bf16[16,64], bf16[6,64,32]) {
  %state = (s32[], bf16[16,64], /*index=2*/bf16[6,64,32]) parameter(0)
  %step = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = bf16[16,64]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %kernels = bf16[6,64,32]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %fused = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %kernels, %step), kind=kOutput, calls=%layer, metadata={op_name="jit(step)/dot" stack_frame_id=2}, backend_config={"window_config":{"estimated_cycles":"1500"}}
  %sums = f32[100]{0:T(128)} all-reduce(%fused), to_apply=%add, metadata={stack_frame_id=1}
  ROOT %next = (s32[], bf16[16,64], bf16[6,64,32]) tuple(%step, %x, %kernels)
}

%counted (state.1: (s32[], bf16[16,64], bf16[6,64,32])) -> pred[] {
  %state.1 = (s32[], bf16[16,64], bf16[6,64,32]) parameter(0)
  %step.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %most = s32[]{:T(128)} constant(6)
  ROOT %again = pred[]{:T(512)} compare(%step.1, %most), direction=LT
}

%open (state.2: (s32[], f32[])) -> pred[] {
  %state.2 = (s32[], f32[]) parameter(0)
  %step.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  %sum = f32[]{:T(128)} get-tuple-element(%state.2), index=1
  %bound = s32[]{:T(128)} constant(9)
  %limit = f32[]{:T(128)} constant(100)
  %below = pred[] compare(%step.2, %bound), direction=LT
  %small = pred[] compare(%sum, %limit), direction=LT
  ROOT %both = pred[] and(%below, %small)
}

%search (state.3: (s32[], f32[])) -> (s32[], f32[]) {
  %state.3 = (s32[], f32[]) parameter(0)
  %step.3 = s32[]{:T(128)} get-tuple-element(%state.3), index=0
  %sum.1 = f32[]{:T(128)} get-tuple-element(%state.3), index=1
  %twice = f32[] add(%sum.1, %sum.1)
  ROOT %next.1 = (s32[], f32[]) tuple(%step.3, %twice)
}

%several (at: s32[2], lengths: s32[2]) -> pred[] {
  %at = s32[2]{0:T(128)} parameter(0)
  %lengths = s32[2]{0:T(128)} parameter(1)
  %few = pred[2]{0} compare(%at, %lengths), direction=LT
  %four = s32[]{:T(128)} constant(4)
  %fours = s32[2]{0:T(128)} broadcast(%four), dimensions={}
  %most.1 = pred[2]{0} compare(%at, %fours), direction=LT
  %left = pred[2]{0} and(%few, %most.1)
  %no = pred[]{:T(512)} constant(false)
  ROOT %any = pred[]{:T(512)} reduce(%left, %no), dimensions={0}, to_apply=%or
}

%some (state.4: (s32[2], s32[2], f32[8])) -> pred[] {
  %state.4 = (s32[2], s32[2], f32[8]) parameter(0)
  %at.1 = s32[2]{0:T(128)} get-tuple-element(%state.4), index=0
  %lengths.1 = s32[2]{0:T(128)} get-tuple-element(%state.4), index=1
  ROOT %any.1 = pred[]{:T(512)} fusion(%at.1, %lengths.1), kind=kLoop, calls=%several
}

%together (state.5: (s32[2], s32[2], f32[8])) -> (s32[2], s32[2], f32[8]) {
  %state.5 = (s32[2], s32[2], f32[8]) parameter(0)
  %at.2 = s32[2]{0:T(128)} get-tuple-element(%state.5), index=0
  %row = f32[8]{0} get-tuple-element(%state.5), index=2
  %sine = f32[8]{0} sine(%row)
  ROOT %next.2 = (s32[2], s32[2], f32[8]) tuple(%at.2, %at.2, %sine)
}

%cheap (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %copy.1 = f32[8]{0} copy(%p)
}

%dear (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %negate = f32[8]{0} negate(%p.1), backend_config={"window_config":{"estimated_cycles":"77"}}
}

ENTRY %main (x.1: bf16[16,64], w: bf16[6,64,32], image: f32[2,8,8,3], k: f32[3,3,3,4], v: f32[8], on: s32[]) -> f32[8] {
  %x.1 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[6,64,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  %image = f32[2,8,8,3]{3,2,1,0} parameter(2)
  %k = f32[3,3,3,4]{3,2,1,0} parameter(3)
  %v = f32[8]{0} parameter(4)
  %on = s32[] parameter(5)
  %start = (s32[], bf16[16,64], bf16[6,64,32]) tuple(%on, %x.1, %w)
  %loop = (s32[], bf16[16,64], bf16[6,64,32]) while(%start), condition=%counted, body=%body
  %searching = (s32[], f32[]) while(%start), condition=%open, body=%search
  %mapped = (s32[2], s32[2], f32[8]) while(%start), condition=%some, body=%together
  %conv = f32[2,4,4,4]{3,2,1,0} convolution(%image, %k), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
  ROOT %choice = f32[8]{0} conditional(%on, %v, %v), branch_computations={%cheap, %dear}
}
"""


@pytest.fixture(scope="module")
def program():
    return hlo.parse(PROGRAM)


@pytest.fixture(scope="module")
def found(program):
    return {operation.instruction.name: operation for operation in operations(program)}


def test_what_runs_is_found_in_loops_and_the_costliest_branch(found):
    assert set(found) == {"fused", "sums", "twice", "sine", "conv", "negate"}


def test_loops_count_by_their_condition(found):
    times = {name: (operation.times, operation.known) for name, operation in found.items()}
    assert times["fused"] == times["sums"] == (6, True)
    assert times["twice"] == (9, False)  # at most
    assert times["sine"] == (4, False)  # for several at once
    assert times["conv"] == (1, True)


def test_cycles_are_the_compilers(found):
    cycles = {name: operation.cycles for name, operation in found.items()}
    assert cycles.pop("fused") == 1500 and cycles.pop("negate") == 77
    assert set(cycles.values()) == {None}


def test_products_inside_a_fusion_count(found):
    assert found["fused"].flops == 2 * 16 * 64 * 32


def test_a_convolution_multiplies_no_padding(found):
    """At stride 2 the first of four places of a side meets the padding once, the others never."""
    pairs = 2 + 3 + 3 + 3
    assert found["conv"].flops == 2 * 2 * 4 * 3 * pairs**2


def test_a_slice_is_read_and_not_the_whole(found):
    """The result stays on the chip."""
    assert found["fused"].bytes == 2 * 16 * 64 + 2 * 64 * 32 + 4
    assert found["conv"].bytes == 4 * (2 * 8 * 8 * 3 + 3 * 3 * 3 * 4 + 2 * 4 * 4 * 4)


def test_communication_is_told_by_kind(found):
    assert {name: x.collective for name, x in found.items() if x.collective} == {
        "sums": "all-reduce"
    }
    assert found["sums"].instruction.bytes == 400


def test_source_lines_are_listed_from_the_inside(program, found):
    assert program.source(found["fused"].instruction) == (
        "/usr/lib/site-packages/flax/linen/linear.py:30 Dense.__call__",
        "/home/me/zegformer_jax/training/step.py:7 train_step",
    )


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("module @jit_step {}")
