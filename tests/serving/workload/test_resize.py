"""Traces of large models, made to fit small engines."""

import pytest

from serving.request import TraceRequest
from serving.workload.errors import TraceError
from serving.workload.requests import Trace
from serving.workload.resize import shrink

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
