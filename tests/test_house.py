"""Result files of the house: complete, atomic, strict JSON."""

import json
import pathlib

import pytest

from experiments.common import results


def test_result_carries_what_made_it(tmp_path: pathlib.Path) -> None:
    meta = results.start_meta({"batch": 8}, seed=3)
    path = results.write_result(tmp_path / "run", meta, [{"a": 1}], {"b": 2.5})
    written = json.loads(path.read_text())
    assert set(written) == {"meta", "rows", "totals"}
    assert set(written["meta"]) == {"command", "config", "versions", "machine", "seed", "started_at"}
    assert written["meta"]["seed"] == 3
    assert written["rows"] == [{"a": 1}]
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_a_failed_write_keeps_the_old_result(tmp_path: pathlib.Path) -> None:
    meta = results.start_meta({}, seed=None)
    path = results.write_result(tmp_path, meta, [{"a": 1}])
    with pytest.raises(ValueError, match="Out of range float"):
        results.write_result(tmp_path, meta, [{"a": float("nan")}])
    assert json.loads(path.read_text())["rows"] == [{"a": 1}]
