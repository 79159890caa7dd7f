"""Lamina's Table 4 from traces at hand, from the command line."""

import json
import pathlib
import subprocess

import pytest

from tests.experiments.scripts import run_script


def run(out: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script("lamina_paper", out, "--table=4", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--traces=Foo=trace.csv",), "--traces=Foo=trace.csv: use name=file, with a name of Azure-Conv"),
        (("--traces=Azure-Conv",), "--traces=Azure-Conv: use name=file"),
        (("--traces=Azure-Conv=nowhere.csv",), "nowhere.csv is not a file"),
        (("--table=99",), "99"),
    ],
)
def test_bad_input_is_one_clear_message(arguments: tuple[str, ...], message: str, tmp_path: pathlib.Path) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def items(out: pathlib.Path, *arguments: str) -> dict[str, dict]:
    """Rows of Table 4 by name."""
    done = run(out, *arguments)
    assert done.returncode == 0, done.stderr
    return {row["item"]: row for row in json.loads((out / "result.json").read_text())["rows"]}


def test_traces_at_hand_are_counted(tmp_path: pathlib.Path) -> None:
    """A file that holds five requests of ten prompt tokens is said to hold just that."""
    path = tmp_path / "short.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "0.5,10,4\n" * 5)
    without, given = items(tmp_path), items(tmp_path, f"--traces=Azure-Conv={path}")
    changed = [item for item in given if given[item] != without.get(item)]
    assert changed
    assert all("Azure-Conv" in item for item in changed)
    assert {given[item]["ours"] for item in changed} >= {5, 10.0, 4.0}
    assert {given[item]["verdict"] for item in changed} == {"not reproduced"}


def test_the_public_traces_reproduce_the_table(
    tmp_path: pathlib.Path, azure_trace: pathlib.Path, conversation_trace: pathlib.Path
) -> None:
    rows = items(tmp_path, f"--traces=Azure-Conv={azure_trace},Kimi-Conv={conversation_trace}")
    measured = [row for name, row in rows.items() if "Azure-Conv" in name or "Kimi-Conv" in name]
    assert len(measured) >= 6
    assert {row["verdict"] for row in measured} == {"reproduced"}
