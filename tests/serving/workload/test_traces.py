"""Reading traces: every format and alias, and what is said of lines that are wrong."""

import dataclasses
import json
import pathlib
import random
import re
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.workload.errors import TraceError
from serving.workload.requests import Trace
from serving.workload.resize import rescale
from serving.workload.traces import read_trace, write_mooncake
from tests.serving.workload.strategies import traces

LINE = {"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [0, 7]}


def write(folder: pathlib.Path, *lines: str | dict[str, object]) -> pathlib.Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_mooncake_lines_and_aliases(tmp_path: pathlib.Path) -> None:
    alias = {"arrived_at": 4.5, "input_tokens": 9, "output_tokens": 2, "tenant": "a", "priority": 1}
    first, second = read_trace(write(tmp_path, LINE, "", alias)).requests
    assert (first.arrival_s, first.input_tokens, first.output_tokens, first.keys) == (0, 700, 5, (0, 7))
    assert (second.arrival_s, second.input_tokens, second.tenant, second.priority) == (1.5, 9, "a", 1)
    assert second.keys == ()


def test_csv_with_a_header(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, "arrived_at,num_prefill_tokens,num_decode_tokens", "0.0,374,44", "4.25,396,109")
    trace = read_trace(path)
    assert [(r.arrival_s, r.input_tokens, r.output_tokens) for r in trace.requests] == [(0, 374, 44), (4.25, 396, 109)]
    assert trace.duration_s == 4.25


@given(traces(), st.sampled_from([512, 64, 16, 1]), st.randoms())
def test_written_traces_are_read_back(trace: Trace, block_size: int, rng: random.Random) -> None:
    trace = rescale(trace, block_size, max_tokens=1 << 20)
    requests = [
        dataclasses.replace(r, tenant=rng.choice(["", "a"]), priority=rng.choice([0, -1, 2])) for r in trace.requests
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.jsonl"
        write_mooncake(path, dataclasses.replace(trace, requests=tuple(requests)))
        back = read_trace(path)
    assert back.block_size == block_size
    assert [dataclasses.replace(r, arrival_s=0.0) for r in back.requests] == [
        dataclasses.replace(r, arrival_s=0.0) for r in requests
    ]
    assert [r.arrival_s for r in back.requests] == pytest.approx([r.arrival_s for r in requests], abs=1e-3)


def test_blocks_of_mooncakes_size_are_not_spelled_out(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, LINE)
    write_mooncake(tmp_path / "again.jsonl", read_trace(path))
    assert json.loads((tmp_path / "again.jsonl").read_text()) == LINE | {"timestamp": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: not JSON"),
        ("[1, 2]", "line 2: [1, 2] is not an object"),
        ({**LINE, "input_length": -4}, "line 2: `input_length` is -4"),
        ({**LINE, "input_length": 1.5}, "line 2: `input_length` is 1.5"),
        ({**LINE, "timestamp": "soon"}, "line 2: `timestamp` is 'soon'"),
        ({**LINE, "timestamp": float("nan")}, "line 2: `timestamp` is nan"),
        ({**LINE, "hash_ids": ["a"]}, "line 2: `hash_ids` is ['a']"),
        ({**LINE, "block_size": 0}, "line 2: `block_size` is 0"),
        ({**LINE, "block_size": 64}, "line 2: `block_size` is 64, and 512 in the lines before"),
        ({"timestamp": 1, "output_length": 3}, "line 2: no `input_length`"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: pathlib.Path, line: str | dict[str, object], message: str) -> None:
    with pytest.raises(TraceError, match=re.escape(message)):
        read_trace(write(tmp_path, LINE, line))


def test_files_that_are_no_traces(tmp_path: pathlib.Path) -> None:
    with pytest.raises(TraceError, match="is not a file"):
        read_trace(tmp_path / "absent")
    with pytest.raises(TraceError, match="is empty"):
        read_trace(write(tmp_path, ""))
    with pytest.raises(TraceError, match="line 1: neither"):
        read_trace(write(tmp_path, "a,b", "1,2"))
    with pytest.raises(TraceError, match="line 3: 2 fields, the header has 3"):
        read_trace(write(tmp_path, "arrived_at,num_prefill_tokens,num_decode_tokens", "0,1,1", "0,1"))
    with pytest.raises(TraceError, match="no requests from number 5"):
        read_trace(write(tmp_path, LINE), start=5)
    with pytest.raises(TraceError, match="`speed` is 0"):
        read_trace(write(tmp_path, LINE), speed=0)


def test_odd_requests_are_handled_and_said(tmp_path: pathlib.Path) -> None:
    odd = ((9, 1, 1), (5, 2, 0), (7, 0, 1))
    lines = [{**LINE, "timestamp": stamp, "input_length": i, "output_length": o} for stamp, i, o in odd]
    trace = read_trace(write(tmp_path, *lines))
    assert [(r.input_tokens, r.output_tokens) for r in trace.requests] == [(2, 1), (1, 1)]
    assert trace.requests[1].arrival_s == pytest.approx(0.004)
    assert len(trace.notes) == 3


def test_speed_slice_and_jitter(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, *({**LINE, "timestamp": 3000 * (index // 10)} for index in range(50)))
    sliced = read_trace(path, start=20, limit=20, speed=2.0)
    assert [r.id for r in sliced.requests] == [str(i) for i in range(20, 40)]
    assert {r.arrival_s for r in sliced.requests} == {0.0, 1.5}
    spread = read_trace(path, jitter_s=3.0, seed=1)
    assert spread == read_trace(path, jitter_s=3.0, seed=1)
    assert len({r.arrival_s for r in spread.requests}) == 50
    arrivals = [r.arrival_s for r in spread.requests]
    assert arrivals == sorted(arrivals)


def test_the_public_traces(conversation_trace: pathlib.Path, azure_trace: pathlib.Path) -> None:
    conversation = read_trace(conversation_trace)
    assert len(conversation.requests) == 12031
    assert sum(len(r.keys) for r in conversation.requests) == 288_500
    assert all(len(r.keys) == -(-r.input_tokens // 512) for r in conversation.requests)
    assert len(read_trace(azure_trace).requests) == 19366
