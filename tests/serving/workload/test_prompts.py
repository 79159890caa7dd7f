"""Prompts: lengths are exact, and prefixes are equal exactly where keys are."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.request import TraceRequest
from serving.workload.errors import TraceError
from serving.workload.prompts import BYTE_IDS, PromptWriter
from serving.workload.requests import Trace
from serving.workload.resize import rescale
from tests.serving.workload.strategies import traces

TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]


@pytest.mark.parametrize("text", [TEXT, BYTE_IDS])
@given(traces(), st.integers(3, 512))
def test_equal_keys_are_equal_prefixes_and_others_are_not(text: Sequence[int], trace: Trace, block_size: int) -> None:
    fitted = rescale(trace, block_size, max_tokens=1 << 20)
    writer = PromptWriter(text, block_size)
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
            after = common + 3  # three tokens spell a block's key
            if shared < min(len(first.keys), len(second.keys)) and after <= min(len(one), len(other)):
                assert one[:after] != other[:after]


def test_the_text_of_a_block_depends_on_its_key_and_the_seed_alone() -> None:
    writer = PromptWriter(TEXT, 8)
    assert writer.block(77, 8) == PromptWriter(TEXT, 8).block(77, 8)
    assert writer.block(77, 5) == PromptWriter(TEXT, 100).block(77, 100)[:5]
    mark, passage = writer.block(77, 8)[:3], writer.block(77, 8)[3:]
    assert mark == [6, 9, 1]  # 77 = 5 + 8 * 9, in the text's nine different tokens as digits
    assert any((TEXT * 2)[start : start + 5] == passage for start in range(len(TEXT)))
    assert PromptWriter(TEXT, 8, seed=1).block(77, 8) != writer.block(77, 8)
    assert len({tuple(writer.block(key, 3)) for key in range(9**3)}) == 9**3


@pytest.mark.parametrize("text", [TEXT, BYTE_IDS])
def test_a_trace_without_keys_shares_nothing(text: Sequence[int]) -> None:
    writer = PromptWriter(text, 8)
    requests = [TraceRequest(id=str(index), arrival_s=0.0, input_tokens=20, output_tokens=1) for index in range(50)]
    assert len({tuple(writer.prompt(request)[:3]) for request in requests}) == 50


def test_a_poor_text_is_refused() -> None:
    with pytest.raises(TraceError, match="A text of 3 tokens, 1 of them different, is too poor"):
        PromptWriter([7, 7, 7], 8)
