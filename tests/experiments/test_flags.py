"""Flags of every script: all of them in `--help`, bad values refused in a sentence."""

import functools
import re

import pytest

from tests.experiments.scripts import ROOT, run_command

SCRIPTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__")
# Scripts that write something else than a result.
WITHOUT_OUT = {"convert_checkpoint", "make_trace", "serve"}


# What the text of a flag says of its unit, by how its name ends.
UNITS = {"_s": "second", "_tokens": "token", "_bytes": "byte", "_mib": "MiB", "_gib": "GiB", "_gb": "GB"}


@functools.cache
def flags_of(script: str) -> dict[str, str]:
    """The text of each flag in the script's `--help`."""
    done = run_command(f"experiments.{script}", "--help")
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^  --(?:\[no\])?", done.stdout, flags=re.MULTILINE)[1:]
    return dict(part.split(":", 1) for part in parts)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_texts_stand_alone_and_name_their_units(script: str) -> None:
    for name, shown in flags_of(script).items():
        # Choices before the text and the default after it are absl's.
        text = re.sub(r"^<[^>]*>: ", "", " ".join(shown.split())).partition(" (")[0]
        assert re.match(r"[A-Z]", text), f"--{name}: {text}"
        assert not re.match(r"(Its|That|This|Of|Those|Such|As|They)\b", text), f"--{name}: {text}"
        for ending, unit in UNITS.items():
            assert not name.endswith(ending) or unit.lower() in text.lower(), f"--{name}: {text}"


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
            assert f"flag --{name}={value}: give " in done.stderr
            assert "give a finite number" in done.stderr
            assert len(done.stderr.splitlines()) <= 3


@pytest.mark.parametrize(
    ("script", "argument", "sentence"),
    [
        ("make_trace", "stray", "Unexpected arguments stray: flags begin with --"),
        ("simulate_cluster", "--trace=nowhere.jsonl", "nowhere.jsonl"),
        ("simulate_cluster", "--speed=2", "--trace is required."),
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
