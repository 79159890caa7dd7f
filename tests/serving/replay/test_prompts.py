"""Workloads fitted to a small model: lengths are exact, and prefixes are equal exactly where block ids are."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.replay import PromptWriter, ReplayError, fitting_block_size, rescale
from serving.request import TraceRequest
from serving.workload.requests import Trace
from serving.workload.synthetic import Lengths, arrivals, prefix_tree

TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Workloads with shared prefixes and partial last blocks."""
    numbers = draw(st.integers(0, 2**32 - 1))
    times = arrivals(draw(st.integers(2, 12)), 1.0, np.random.default_rng(numbers))
    inputs, outputs = Lengths(draw(st.integers(1, 4000)), cv=1.0), Lengths(draw(st.integers(1, 600)), cv=0.5)
    return prefix_tree(times, inputs, outputs, draw(st.floats(0, 0.9)), seed=numbers)


@given(traces(), st.integers(3, 512))
def test_equal_keys_are_equal_prefixes_and_others_are_not(trace: Trace, block_size: int) -> None:
    fitted = rescale(trace, block_size, max_tokens=1 << 20)
    writer = PromptWriter(TEXT, block_size)
    prompts = [writer.prompt(request) for request in fitted.requests]
    assert [len(prompt) for prompt in prompts] == [request.input_tokens for request in fitted.requests]
    for first, one in zip(fitted.requests, prompts, strict=True):
        for second, other in zip(fitted.requests, prompts, strict=True):
            shared = 0
            while shared < min(len(first.keys), len(second.keys)):
                if first.keys[shared] != second.keys[shared]:
                    break
                shared += 1
            common = min(shared * block_size, len(one), len(other))
            assert one[:common] == other[:common]
            after = common + 3  # three tokens spell a block's id
            if shared < min(len(first.keys), len(second.keys)) and after <= min(len(one), len(other)):
                assert one[:after] != other[:after]


def test_the_text_of_a_block_depends_on_its_id_and_the_seed_alone() -> None:
    writer = PromptWriter(TEXT, 8)
    assert writer.block(77, 8) == PromptWriter(TEXT, 8).block(77, 8)
    assert writer.block(77, 5) == PromptWriter(TEXT, 100).block(77, 100)[:5]
    mark, passage = writer.block(77, 8)[:3], writer.block(77, 8)[3:]
    assert mark == [6, 9, 1]  # 77 = 5 + 8 * 9, in the text's nine different tokens as digits
    assert any((TEXT * 2)[start : start + 5] == passage for start in range(len(TEXT)))
    assert PromptWriter(TEXT, 8, seed=1).block(77, 8) != writer.block(77, 8)
    assert len({tuple(writer.block(block_id, 3)) for block_id in range(9**3)}) == 9**3


def test_a_trace_without_keys_shares_nothing() -> None:
    writer = PromptWriter(TEXT, 8)
    requests = [TraceRequest(id=str(index), arrival_s=0.0, input_tokens=20, output_tokens=1) for index in range(50)]
    assert len({tuple(writer.prompt(request)[:3]) for request in requests}) == 50


def test_a_poor_text_is_refused() -> None:
    with pytest.raises(ReplayError, match="A text of 3 tokens, 1 of them different, is too poor"):
        PromptWriter([7, 7, 7], 8)


@given(traces(), st.integers(64, 4096))
def test_lengths_shrink_by_one_factor_and_fit(trace: Trace, max_tokens: int) -> None:
    size = fitting_block_size(trace, max_tokens)
    fitted = rescale(trace, size, max_tokens)
    assert 1 <= size <= trace.block_size == 512
    assert fitted.block_size == size
    cut = 0
    for before, after in zip(trace.requests, fitted.requests, strict=True):
        assert (after.id, after.arrival_s) == (before.id, before.arrival_s)
        assert after.input_tokens + after.output_tokens <= max_tokens
        assert abs(after.output_tokens - before.output_tokens * size / 512) <= 1
        assert after.keys == before.keys[: math.ceil(after.input_tokens / size)]
        whole = before.input_tokens * size / 512
        cut += after.input_tokens < math.floor(whole)
        assert after.input_tokens <= math.ceil(whole)
    assert cut <= 0.05 * len(trace.requests)
    assert any("prompts cut" in note for note in fitted.notes) == bool(cut)


def test_what_fits_already_stays_as_it_is() -> None:
    trace = Trace(
        "whole",
        (
            TraceRequest(id="0", arrival_s=0.0, input_tokens=700, output_tokens=9, keys=(4, 5)),
            TraceRequest(id="1", arrival_s=2.5, input_tokens=20, output_tokens=1, keys=(6,)),
        ),
    )
    assert fitting_block_size(trace, 1024) == 512
    assert rescale(trace, 512, 1024) == trace


def test_an_output_that_leaves_no_room_for_a_prompt_is_refused() -> None:
    trace = Trace("long", (TraceRequest(id="3", arrival_s=0.0, input_tokens=700, output_tokens=2000, keys=(4, 5)),))
    with pytest.raises(ReplayError, match="Request 3 generates 500 tokens at this scale, and the model takes 256"):
        rescale(trace, 128, 256)
    assert rescale(trace, fitting_block_size(trace, 256), 256).requests[0].output_tokens < 256


def test_an_empty_block_size_is_refused() -> None:
    with pytest.raises(ReplayError, match="Blocks of 0 tokens"):
        rescale(Trace("x", (TraceRequest(id="0", arrival_s=0.0, input_tokens=10, output_tokens=1),)), 0, 100)
