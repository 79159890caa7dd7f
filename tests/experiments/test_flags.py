"""Flags of every script: all of them in `--help`, bad values refused in a sentence."""

import re

import pytest

from tests.experiments.scripts import ROOT, run_command

SCRIPTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__")
# Scripts that write something else than a result.
WITHOUT_OUT = {"convert_checkpoint", "make_trace", "serve"}


def flags_of(script: str) -> dict[str, str]:
    """The text of each flag in the script's `--help`."""
    parts = re.split(r"^  --(?:\[no\])?", run_command(f"experiments.{script}", "--help").stdout, flags=re.MULTILINE)[1:]
    return dict(part.split(":", 1) for part in parts)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_flag_and_numbers_are_finite(script: str) -> None:
    found = flags_of(script)
    assert "seed" in found
    assert ("out" in found) == (script not in WITHOUT_OUT)
    assert all(text.strip() for text in found.values())
    numbers = [
        name for name, text in found.items() if re.search(r"^    \((a|number).*number|^    \(number", text, re.M)
    ]
    assert numbers or script not in ("simulate_cluster", "replay_trace")
    for name in numbers:
        for value in ("nan", "inf"):
            done = run_command(f"experiments.{script}", f"--{name}={value}")
            assert done.returncode == 1
            assert f"flag --{name}={value}: give a finite number" in done.stderr
            assert len(done.stderr.splitlines()) <= 3


@pytest.mark.parametrize(
    ("script", "argument", "sentence"),
    [
        ("make_trace", "stray", "Unexpected arguments stray: flags begin with --"),
        ("simulate_cluster", "--trace=nowhere.jsonl", "nowhere.jsonl"),
        ("simulate_cluster", "--admision=none", "Did you mean: admission"),
        ("bench_simulator", "--requests=1", "`1` is below 100"),
        ("bench_simulator", "--instances=4-2", "`4-2` is neither a number nor a range such as 0-4"),
        ("bench_paged_attention", "--backend=xls", "`xls` is unknown: perhaps xla; known are auto"),
    ],
)
def test_a_bad_value_is_refused_in_a_sentence(script: str, argument: str, sentence: str) -> None:
    required = ("--trace_out=unused",) if script == "make_trace" else ()
    done = run_command(f"experiments.{script}", *required, argument)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert done.stderr.endswith(f" (`python -m experiments.{script} --help` lists the flags.)\n")
    assert len(done.stderr.splitlines()) <= 3


@pytest.mark.parametrize(
    ("script", "once", "again"),
    [
        ("bench_simulator", "--requests=100", "--requests=400"),
        ("bench_engine", "--peer=deterministic", "--peer=vllm"),
        ("plan_deployment", "--kv=int8", "--kv=bfloat16"),
        ("simulate_cluster", "--fail=60:3", "--fail=200:9"),
    ],
)
def test_a_list_given_twice_is_refused(script: str, once: str, again: str) -> None:
    done = run_command(f"experiments.{script}", once, again)
    assert done.returncode == 1
    assert f"{again}: already defined as" in done.stderr
