"""`simulate_cluster` from the command line: its flags reach the cluster, its files hold what they promise, and bad
flags are told clearly."""

import json
import pathlib
import subprocess

import pytest

from tests.experiments.scripts import TRACE, run_script


def run(out: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script("simulate_cluster", out, f"--trace={TRACE}", *arguments)


def totals(out: pathlib.Path, *arguments: str) -> dict:
    done = run(out, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "result.json").read_text())["totals"]


def test_a_cluster_with_everything(tmp_path: pathlib.Path) -> None:
    found = totals(
        tmp_path,
        *("--prefill=2", "--decode=2", "--roles", "--switch_s=1", "--speed=20", "--placement=marginal"),
        *("--admission=shortest_output", "--fail=1:0", "--join=3:0", "--host_tokens=20000", "--ssd_tokens=20000"),
        *("--store_tokens=1000000", "--store_nics=2", "--plots", "--timeline"),
    )
    requests = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert found["requests"] == len(requests) == len(TRACE.read_text().splitlines())
    assert found["completed"] == sum(request["outcome"] == "completed" for request in requests)
    assert set(found["hit_rate_by_tier"]) == {"host", "ssd", "remote", "store"}
    assert sum(found["hit_rate_by_tier"].values()) == pytest.approx(found["hit_rate"])
    assert {"switches", "reruns", "node_hours", "cost", "cost_per_hour"} <= set(found)
    # Node 0 was away for two seconds, so less than four nodes were paid.
    assert 0 < found["cost_per_hour"] < 4 * 8 * 1.39
    assert {"queue_s", "transfer_s", "prefill", "ttft_s", "tbt", "output_tokens"} <= set(found["estimator_errors"])
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"load.png", "roles.png", "replicas.png", "hits.png"}


def test_groups_are_worth_their_nodes(tmp_path: pathlib.Path) -> None:
    flags = ("--prefill=4", "--decode=1", "--prefill_chunk=512", "--nolayer_wise")
    alone, grouped = (totals(tmp_path / cpp, f"--cpp={cpp}", *flags) for cpp in ("1", "4"))
    assert alone["completed"] == grouped["completed"] == alone["requests"]
    assert grouped["ttft_s"]["p99"] < alone["ttft_s"]["p99"]
    assert grouped["cost_per_hour"] == pytest.approx(5 * 8 * 1.39)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prefill=3", "--cpp=2"), "use at least 1 of both, and a multiple of the group as nodes"),
        (("--prefill=0", "--decode=0", "--coupled=2", "--roles"), "Coupled nodes have no roles to change"),
        (
            ("--fail=5",),
            "flag --fail=5: give seconds:node with commas between them; `5` is not seconds:node, such as 60:3",
        ),
        (("--join=5:99",), "there are nodes 0 to 15"),
    ],
)
def test_what_cannot_be_is_told(tmp_path: pathlib.Path, flags: tuple[str, ...], message: str) -> None:
    done = run(tmp_path, *flags)
    assert done.returncode == 1
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
