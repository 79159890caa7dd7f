"""Traces of large models, made to fit small engines."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.request import TraceRequest
from serving.workload.errors import TraceError
from serving.workload.requests import Trace
from serving.workload.resize import fitting_block_size, rescale, shrink
from tests.serving.workload.strategies import traces

TRACE = Trace(
    "t",
    (
        TraceRequest(id="0", arrival_s=0.0, input_tokens=1000, output_tokens=100, keys=(1, 2)),
        TraceRequest(id="1", arrival_s=2.0, input_tokens=513, output_tokens=1, keys=(1, 3)),
    ),
)


def test_blocks_prompts_and_outputs_shrink_alike() -> None:
    small = shrink(TRACE, 32)
    assert small.block_size == 16
    assert [(r.input_tokens, r.output_tokens, r.keys) for r in small.requests] == [
        (32, 3, (1, 2)),
        (17, 1, (1, 3)),
    ]
    assert small.notes == ("tokens were divided by 32",)
    assert shrink(TRACE, 1) is TRACE


def test_outputs_may_shrink_less() -> None:
    small = shrink(TRACE, 32, 4)
    assert [(r.input_tokens, r.output_tokens) for r in small.requests] == [(32, 25), (17, 1)]
    assert small.notes == ("tokens were divided by 32, those of outputs by 4",)


@pytest.mark.parametrize(
    ("divisors", "message"),
    [((3,), "Blocks of 512 tokens cannot be divided by 3"), ((0,), "by 0"), ((2, 0), "Outputs cannot be divided by 0")],
)
def test_impossible_divisors_are_refused(divisors: tuple[int, ...], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        shrink(TRACE, *divisors)


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
    with pytest.raises(TraceError, match="Request 3 generates 500 tokens at this scale, and the model takes 256"):
        rescale(trace, 128, 256)
    assert rescale(trace, fitting_block_size(trace, 256), 256).requests[0].output_tokens < 256


def test_an_empty_block_size_is_refused() -> None:
    with pytest.raises(TraceError, match="Blocks of 0 tokens"):
        rescale(Trace("x", (TraceRequest(id="0", arrival_s=0.0, input_tokens=10, output_tokens=1),)), 0, 100)


@given(traces(), st.sampled_from([1, 2, 8, 32, 512]))
def test_shrinking_is_rescaling_by_a_divisor(trace: Trace, divisor: int) -> None:
    one, other = shrink(trace, divisor), rescale(trace, 512 // divisor, max_tokens=1 << 20)
    assert (one.requests, one.block_size) == (other.requests, other.block_size)
