"""Tile sizes: what a tuner keeps, with times made up, and that the dispatcher takes it."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from model.kernels.paged_attention import TileSizes, paged_attention, tuning
from tests.model.kernels.paged_attention import cases
from tests.model.kernels.paged_attention.tpu_cases import DECODES, V6E, lowered_for


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    return tmp_path


def test_the_fastest_is_kept_and_noise_is_not() -> None:
    times = {TileSizes(): 1.0, TileSizes(splits=4): 0.5, TileSizes(splits=8): 0.6}
    best = tuning.tune("mosaic_gpu", cases.problem(), lambda sizes: times.get(sizes, 2.0))
    assert (best.tile_sizes, best.time_s, best.heuristic_time_s) == (TileSizes(splits=4), 0.5, 1.0)
    same = tuning.tune("mosaic_gpu", cases.problem(), lambda sizes: 1.0 if sizes == TileSizes() else 0.99)
    assert (same.tile_sizes, same.time_s) == (TileSizes(), 1.0)


def test_what_does_not_fit_the_device_is_passed_over_and_other_errors_are_not() -> None:
    def measure(sizes: TileSizes, message: str = "RESOURCE_EXHAUSTED: vmem") -> float:
        if sizes.decode_keys == 1024:
            raise jax.errors.JaxRuntimeError(message)
        return 1.0 / (sizes.decode_keys or 1)

    assert tuning.tune("pallas_tpu", cases.problem(), measure).tile_sizes == TileSizes(decode_keys=2048)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        tuning.tune("pallas_tpu", cases.problem(), lambda sizes: measure(sizes, "INTERNAL: no"))


def test_files_are_by_kind_of_device_and_by_case(folder) -> None:
    entry = tuning.Entry(tuning.case_of("mosaic_gpu", cases.problem(rows=30)), TileSizes(splits=2), 0.1, 0.2)
    other = tuning.Entry(tuning.case_of("mosaic_gpu", cases.problem(rows=1)), TileSizes(), 0.3, 0.3)
    tuning.write("NVIDIA H200", [entry, other], {"command": "tune"})
    again = dataclasses.replace(entry, tile_sizes=TileSizes(splits=8))
    path = tuning.write("NVIDIA H200", [again], {"command": "tune again"})
    assert path == folder / "nvidia_h200.json"
    assert tuning.read("NVIDIA H200") == (other, again)
    assert json.loads(path.read_text())["entries"][1]["tile_sizes"] == {"splits": 8}
    # 17 to 32 rows are one case.
    assert tuning.tile_sizes_for("mosaic_gpu", cases.problem(rows=17), "NVIDIA H200") == TileSizes(splits=8)
    assert tuning.tile_sizes_for("mosaic_gpu", cases.problem(rows=33), "NVIDIA H200") == TileSizes()
    assert tuning.tile_sizes_for("mosaic_gpu", cases.problem(rows=17), "NVIDIA H100") == TileSizes()


def test_a_broken_file_is_named(folder) -> None:
    (folder / "cpu.json").write_text('{"entries": [{"tile_sizes": {"width": 3}}]}')
    with pytest.raises(ValueError, match=r"cpu\.json holds no tuned tile sizes"):
        tuning.read("cpu")


def test_the_dispatcher_takes_what_was_measured(folder) -> None:
    step = DECODES["bf16"]

    def lowered() -> str:
        # A function of its own each time: one traced before is not traced again.
        return lowered_for(V6E, types.SimpleNamespace(batch=step.batch, attend=lambda batch: step.attend(batch)))

    before = lowered()
    sizes = {"q_heads": 32, "rows": step.rows, "tokens": step.tokens, "max_pages": 64}
    entry = tuning.Entry(tuning.case_of("pallas_tpu", cases.problem(**sizes)), TileSizes(decode_keys=128), 1.0, 2.0)
    tuning.write(V6E.device_kind, [entry], {})
    assert lowered() != before


@pytest.mark.parametrize(
    "tile_sizes", [TileSizes(decode_keys=32), TileSizes(prefill_keys=32, prefill_queries=16)], ids=str
)
def test_results_do_not_depend_on_tile_sizes(tile_sizes: TileSizes) -> None:
    batch = cases.build(cases.Shape(2, 1, 128), [70, 33], [1, 20])
    out = paged_attention(*batch, max_query_len=20, implementation="pallas_tpu", tile_sizes=tile_sizes)
    expected, _ = cases.dense_attention(batch)
    np.testing.assert_allclose(np.asarray(out)[:21], expected[:21], rtol=1e-5, atol=1e-5)


def test_backends_without_blocks_say_so() -> None:
    with pytest.raises(NotImplementedError, match="'xla' has no tile sizes"):
        tuning.candidates("xla", cases.problem())
