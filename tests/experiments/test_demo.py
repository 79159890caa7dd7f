"""The demo as a person runs it, and how it ends when something goes wrong; the model that ships with the project."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from experiments.common.assets import DEMO_MODEL
from model.training.corpus import read_corpus
from tests.experiments.scripts import ROOT, result_of

SIZE_LIMIT = 8_000_000  # bytes, everything that ships with the model


class Demo:
    """A running demo."""

    def __init__(self, out: pathlib.Path, *arguments: str) -> None:
        self._printed = out / "printed"
        with self._printed.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "experiments.demo", f"--out={out}", *arguments],
                cwd=ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def printed(self) -> str:
        return self._printed.read_text()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 300
        while text not in self.printed:
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.05)

    def servers(self) -> list[int]:
        """Its child processes."""
        return [
            int(pid)
            for pid in pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]


def test_the_demo_serves_replays_and_reports(tmp_path: pathlib.Path) -> None:
    demo = Demo(tmp_path, "--limit=6", "--speed=20")
    assert demo.process.wait(600) == 0, demo.printed
    totals = json.loads((tmp_path / "result.json").read_text())["totals"]
    assert (totals["requests"], totals["completed"], totals["compiles_after_warm_up"]) == (6, 6, 0)
    assert totals["hit_rate"] <= totals["unlimited_hit_rate"]
    assert totals["ttft_s"]["p99"] > 0
    assert totals["tbt_s"]["p99"] > 0
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 6
    assert (tmp_path / "replay.png").stat().st_size > 10_000
    for row in (
        "6: 6 completed",
        "TTFT",
        "TBT",
        "prefix hits",
        "preemptions",
        "compiles after warm-up",
        "arrival skew",
    ):
        assert row in demo.printed
    # What the model says is English: nearly every word is one that the documentation uses.
    said = demo.printed[demo.printed.index("says:") : demo.printed.index("replay ")]
    words = re.findall(r"[a-z]{4,}", said.lower())
    known = {word for d in read_corpus() for entry in d.entries for word in re.findall(r"[a-z]{4,}", entry.lower())}
    assert len(words) > 20
    assert sum(word in known for word in words) > 0.9 * len(words)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Who runs in the background of a shell ignores SIGINT, and so would the processes that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_demo_leaves_no_server(tmp_path: pathlib.Path) -> None:
    demo = Demo(tmp_path)
    demo.wait_for("Loading")
    (server,) = demo.servers()
    demo.process.send_signal(signal.SIGINT)
    assert demo.process.wait(300) == 1
    assert demo.printed.endswith("Interrupted; the server was stopped.\n")
    assert not pathlib.Path(f"/proc/{server}").exists()


def test_a_server_that_dies_ends_the_demo_with_its_last_words(tmp_path: pathlib.Path) -> None:
    demo = Demo(tmp_path)
    demo.wait_for("sent,")
    (server,) = demo.servers()
    os.kill(server, signal.SIGKILL)
    assert demo.process.wait(300) == 1
    assert "The server was killed by signal 9. Its last output" in demo.printed
    assert "Serving demo_model at" in demo.printed.rpartition("Its last output")[2]


def test_the_model_that_ships_is_small_and_scores_what_is_recorded(tmp_path: pathlib.Path) -> None:
    assert sum(path.stat().st_size for path in DEMO_MODEL.iterdir()) <= SIZE_LIMIT
    recorded = json.loads((DEMO_MODEL / "evaluation.json").read_text())
    assert recorded["made_by"]["command"].startswith("python -m experiments.train_lm")
    scored, _ = result_of("eval_lm", tmp_path, f"--checkpoint={DEMO_MODEL}", "--context=256")
    (row,) = scored["rows"]
    # Float32 sums in another order, over the 33 thousand tokens of the stored text, whatever the Python and the CPU.
    assert row["bits_per_byte"] == pytest.approx(row["recorded_bits_per_byte"], rel=1e-5)
    assert row == {"recorded_bits_per_byte": row["recorded_bits_per_byte"]} | recorded["evaluations"][0] | {
        "bits_per_byte": row["bits_per_byte"]
    }
