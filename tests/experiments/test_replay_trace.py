"""The replay script from the command line, against a real server process and against none."""

import json
import os
import pathlib
import subprocess
from collections.abc import Iterator

import pytest

from experiments.common.server_process import ServerDiedError, ServerProcess
from tests.experiments.scripts import run_script
from tests.serving.api.conftest import SERVER_FLAGS
from tests.serving.api.conftest import tiny_model as tiny_model

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 20
# Two turns of one conversation, another conversation, and a request that is too long.
LINES = (
    {"timestamp": 0, "input_length": 1200, "output_length": 100, "hash_ids": [0, 1, 2]},
    {"timestamp": 300, "input_length": 700, "output_length": 60, "hash_ids": [7, 8]},
    {"timestamp": 900, "input_length": 2000, "output_length": 80, "hash_ids": [0, 1, 3, 4]},
    {"timestamp": 1100, "input_length": 90000, "output_length": 20, "hash_ids": [*range(9, 185)]},
)


def replay(out: pathlib.Path, trace: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (out / "text").write_text(TEXT)
    return run_script("replay_trace", out, f"--trace={trace}", f"--text={out / 'text'}", *arguments)


@pytest.fixture(scope="module")
def server(tiny_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tiny_model, tmp_path_factory.mktemp("server") / "log", *SERVER_FLAGS) as process:
        yield process


@pytest.fixture
def trace(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_a_trace_is_replayed(server: ServerProcess, trace: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = replay(tmp_path, trace, f"--url={server.url}", "--scale=0.25", "--speed=2")
    assert done.returncode == 0, done.stderr
    requests = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert [request["input_tokens"] for request in requests] == [300, 175, 500, 1019]  # 1024 less 5 of output
    assert [request["output_tokens"] for request in requests] == [25, 15, 20, 5]
    assert [request["arrival_s"] for request in requests] == [0, 0.15, 0.45, 0.55]
    assert {request["outcome"] for request in requests} == {"completed"}
    # The second turn reuses the two blocks of 128 tokens that it shares with the first.
    assert [request["hit_tokens"] for request in requests] == [0, 0, 256, 0]
    totals = json.loads((tmp_path / "result.json").read_text())["totals"]
    assert (totals["requests"], totals["completed"], totals["preemptions"]) == (4, 4, 0)
    assert totals["hit_rate"] == totals["unlimited_hit_rate"] == pytest.approx(256 / 1994)
    assert totals["compiles_after_warm_up"] == 0
    assert all(request["ttft_s"] > 0 and request["tbt_s"] >= 0 for request in requests)
    assert totals["tbt_s"]["p99"] > 0
    assert (tmp_path / "replay.png").stat().st_size > 10_000
    assert "1 prompts cut" in done.stdout
    assert "arrival skew" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url=http://127.0.0.1:9"], "The server at http://127.0.0.1:9 does not answer (ConnectError"),
        (["--trace=nowhere.jsonl"], "nowhere.jsonl is not a file"),
        (["--text=nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(
    trace: pathlib.Path, tmp_path: pathlib.Path, arguments: list[str], message: str
) -> None:
    refused = replay(tmp_path, trace, *arguments)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "result.json").exists()


def test_a_malformed_line_is_named(trace: pathlib.Path, tmp_path: pathlib.Path) -> None:
    trace.write_text(trace.read_text() + '{"timestamp": 1200, "input_length": "many"}\n')
    refused = replay(tmp_path, trace)
    assert refused.returncode == 1
    assert "line 5: `input_length` is 'many'. Mend or remove the line." in refused.stderr


def test_a_server_that_dies_is_told_with_its_last_words(tiny_model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with ServerProcess(tiny_model, tmp_path / "log", *SERVER_FLAGS) as server:
        server.check()
        os.kill(server.pid, 9)
        server.exit_code(timeout_s=300)
        with pytest.raises(ServerDiedError, match=r"killed by signal 9(.|\n)*compiling steps 1/(.|\n)*Serving tiny at"):
            server.check()
