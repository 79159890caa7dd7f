"""Hit rates by policy and capacity from the command line, on the small trace that ships with the project."""

import json
import pathlib

import pytest

from serving.simulator.hit_rates import named_policy, replay_hits
from serving.workload.traces import read_trace
from tests.experiments.scripts import TRACE, run_script


def test_every_policy_at_every_capacity(tmp_path: pathlib.Path) -> None:
    done = run_script(
        "cache_capacity", tmp_path, f"--trace={TRACE}", "--policies=lru,turns,belady", "--capacities=200,50,50"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    trace = read_trace(TRACE)
    assert result["totals"]["block_references"] == sum(len(request.keys) for request in trace.requests)
    rows = {(row["policy"], row["capacity_blocks"]): row for row in result["rows"]}
    assert [*rows] == [(name, capacity) for name in ("lru", "turns", "belady") for capacity in (50, 200)]
    for (name, capacity), row in rows.items():
        assert row["hit_rate"] == replay_hits(trace, named_policy(name, capacity, trace)).rate
        low, high = (rows[other, capacity]["hit_rate"] for other in ("lru", "belady"))
        assert row["gap_closed"] == pytest.approx((row["hit_rate"] - low) / (high - low))
    assert result["totals"]["best_online"]["50"]["policy"] in ("lru", "turns")
    assert (tmp_path / "hit_rate.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trace=nowhere.jsonl",), "nowhere.jsonl is not a file; name a Mooncake JSONL"),
        ((f"--trace={TRACE}", "--policies=mru"), "No eviction policy `mru`; known: lru, fifo"),
        ((f"--trace={TRACE}", "--capacities=10,many"), "`many` is neither a number nor a range"),
        ((f"--trace={TRACE}", "--capacities=0"), "`0` is below 1"),
    ],
)
def test_bad_input_is_one_clear_message(arguments: tuple[str, ...], message: str, tmp_path: pathlib.Path) -> None:
    done = run_script("cache_capacity", tmp_path, *arguments)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_trace_without_blocks_has_nothing_to_hit(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,100,5\n")
    done = run_script("cache_capacity", tmp_path, f"--trace={path}")
    assert done.returncode != 0
    assert "lengths has no block ids, so nothing can be hit; use a trace with `hash_ids`" in " ".join(
        done.stderr.split()
    )
