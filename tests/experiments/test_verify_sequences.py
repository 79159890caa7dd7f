"""The verifier from the command line: counts what holds, refuses what does not by its line."""

import csv
import json
import pathlib
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.io

from gan import catalogue
from gan.problems import problem
from gan.sequences import exhaustive, known
from tests.experiments.scripts import ROOT, run_script


def verify(tmp_path: pathlib.Path, *paths: pathlib.Path) -> subprocess.CompletedProcess[str]:
    return run_script("verify_sequences", tmp_path / "out", *map(str, paths))


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    """A catalogue of all 96 optimal pairs of length 5, the first one twice, and of Barker's code of length 13."""
    pair, mmf = problem("ob_zcp", 5, kind=1), problem("mmf", 13)
    codes = exhaustive.optimal_pairs(5, 1).reshape(-1, 10)
    codes = np.concatenate([codes, codes[:1]])
    entries = catalogue.certified(pair, codes, method="exhaustion", seed=0, evaluations=np.arange(len(codes)))
    barker = mmf.from_text(["+++++--++-+-+"])
    entries += catalogue.certified(mmf, barker[None], method="by hand", seed=0, evaluations=np.array([1]))
    path = tmp_path / "catalogue.jsonl"
    catalogue.write(path, entries)
    return path


def test_a_catalogue_that_holds_is_counted(tmp_path: pathlib.Path, path: pathlib.Path) -> None:
    done = verify(tmp_path, path)
    assert done.returncode == 0, done.stderr
    pairs, codes = json.loads((tmp_path / "out" / "result.json").read_text())["rows"]
    assert [pairs[name] for name in ("lines", "distinct", "classes", "hits", "best")] == [97, 96, 2, 97, 0.0]
    assert [codes[name] for name in ("lines", "distinct", "classes", "hits", "best")] == [1, 1, 1, 1, 37.0]
    assert codes["our table"] == 37
    assert pairs["record over"] is codes["record over"] is None  # nobody has published an SIR at N = 13


def test_codes_are_exported_with_their_filters(tmp_path: pathlib.Path, path: pathlib.Path) -> None:
    done = run_script("verify_sequences", tmp_path / "out", str(path), "--export=csv,mat")
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader((tmp_path / "out" / "codes.csv").read_text().splitlines())
    assert (row["length"], row["method"], row["hex"], row["psl"]) == ("13", "by hand", "1F35", "1")
    ((digits, *taps),) = csv.reader((tmp_path / "out" / "filters.csv").read_text().splitlines())
    assert digits == "1F35"
    mat = scipy.io.loadmat(tmp_path / "out" / "codes.mat")
    code, filter_ = (mat[name].ravel()[0].ravel() for name in ("codes", "taps"))
    np.testing.assert_array_equal(filter_, [float(tap) for tap in taps])
    assert filter_ @ code == pytest.approx(13)
    assert run_script("verify_sequences", tmp_path / "out", str(path), "--export=xls").returncode != 0


def test_a_record_names_what_it_exceeds() -> None:
    found = {"Legendre's four times": known.record_over(59, 50.8), "AlphaSeq's": known.record_over(59, 33.5)}
    assert found["AlphaSeq's"] is None
    assert "arXiv:2012.05645" in found["Legendre's four times"].source
    assert known.record_over(103, 1e3) is None


def test_every_code_that_ships_is_the_best_of_our_table(tmp_path: pathlib.Path) -> None:
    done = verify(tmp_path, ROOT / "experiments" / "assets" / "mmf_codes.jsonl")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "result.json").read_text())["rows"]
    assert all(row["lines"] == 1 for row in rows)
    assert all(row["best"] == pytest.approx(row["our table"], abs=1e-3) for row in rows)


def test_every_pair_that_ships_is_optimal_and_of_its_own_class(tmp_path: pathlib.Path) -> None:
    done = verify(tmp_path, ROOT / "experiments" / "assets" / "ob_zcp_codes.jsonl")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "result.json").read_text())["rows"]
    assert all(row["lines"] == row["hits"] == row["classes of hits"] for row in rows)


def _flip(line: dict[str, Any]) -> None:
    first, *others = line["sequences"]
    line["sequences"] = [first[:2] + ("-" if first[2] == "+" else "+") + first[3:], *others]


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another chip": (_flip, "`value` is 0.0, but the code has -"),
    "a wrong symbol": (lambda line: line.update(sequences=["++x+-", "+++-+"]), "x"),
    "a wrong length": (lambda line: line.update(sequences=["++++-", "+++-"]), "has 4 chips, must have 5"),
    "a sequence too many": (lambda line: line["sequences"].append("+++++"), "has 2 sequences, got 3"),
    "a value made up": (lambda line: line.update(value=1.0), "`value` is 1.0, but the code has 0.0"),
    "another class": (lambda line: line.update(class_id="0" * 16), "but the code is of class"),
    "a problem unknown": (lambda line: line.update(problem="sudoku"), "'sudoku' is unknown"),
    "a field missing": (lambda line: line.pop("evaluation"), "lacks `evaluation`"),
}


@pytest.mark.parametrize("damage", BAD)
def test_a_bad_line_is_refused_by_number(path: pathlib.Path, damage: str) -> None:
    change, message = BAD[damage]
    lines = path.read_text().splitlines()
    line = json.loads(lines[40])
    change(line)
    lines[40] = json.dumps(line)
    path.write_text("\n".join(lines))
    with pytest.raises(catalogue.CatalogueError, match="line 41: ") as refusal:
        list(catalogue.read(path))
    assert message in str(refusal.value)


def test_the_script_refuses_with_an_exit_status(tmp_path: pathlib.Path, path: pathlib.Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:-5], *lines[3:]]))
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    for arguments, message in (
        ((path,), "line 3: is not JSON"),
        ((tmp_path / "nowhere.jsonl",), "nowhere.jsonl"),
        ((empty,), "nothing to verify"),
        ((), "Name one or more catalogues"),
    ):
        done = verify(tmp_path, *arguments)
        assert done.returncode != 0
        assert message in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
