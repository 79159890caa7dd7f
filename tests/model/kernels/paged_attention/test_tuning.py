"""Block sizes: what a tuner keeps, with times made up, and that the dispatcher takes it."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from model.kernels.paged_attention import Blocks, paged_attention, tuning
from tests.model.kernels.paged_attention import cases
from tests.model.kernels.paged_attention.tpu_cases import DECODES, V6E, lowered_for


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    return tmp_path


def test_the_fastest_is_kept_and_noise_is_not() -> None:
    times = {Blocks(): 1.0, Blocks(splits=4): 0.5, Blocks(splits=8): 0.6}
    best = tuning.tune("mosaic_gpu", cases.problem(), lambda blocks: times.get(blocks, 2.0))
    assert (best.blocks, best.time_s, best.heuristic_time_s) == (Blocks(splits=4), 0.5, 1.0)
    same = tuning.tune("mosaic_gpu", cases.problem(), lambda blocks: 1.0 if blocks == Blocks() else 0.99)
    assert (same.blocks, same.time_s) == (Blocks(), 1.0)


def test_what_does_not_fit_the_device_is_passed_over_and_other_errors_are_not() -> None:
    def measure(blocks: Blocks, message: str = "RESOURCE_EXHAUSTED: vmem") -> float:
        if blocks.decode_keys == 1024:
            raise jax.errors.JaxRuntimeError(message)
        return 1.0 / (blocks.decode_keys or 1)

    assert tuning.tune("pallas_tpu", cases.problem(), measure).blocks == Blocks(decode_keys=2048)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        tuning.tune("pallas_tpu", cases.problem(), lambda blocks: measure(blocks, "INTERNAL: no"))


def test_files_are_by_kind_of_device_and_by_case(folder) -> None:
    entry = tuning.Entry(tuning.case_of("mosaic_gpu", cases.problem(rows=30)), Blocks(splits=2), 0.1, 0.2)
    other = tuning.Entry(tuning.case_of("mosaic_gpu", cases.problem(rows=1)), Blocks(), 0.3, 0.3)
    tuning.write("NVIDIA H200", [entry, other], {"command": "tune"})
    again = dataclasses.replace(entry, blocks=Blocks(splits=8))
    path = tuning.write("NVIDIA H200", [again], {"command": "tune again"})
    assert path == folder / "nvidia_h200.json"
    assert tuning.read("NVIDIA H200") == (other, again)
    assert json.loads(path.read_text())["entries"][1]["blocks"] == {"splits": 8}
    # 17 to 32 rows are one case.
    assert tuning.blocks_for("mosaic_gpu", cases.problem(rows=17), "NVIDIA H200") == Blocks(splits=8)
    assert tuning.blocks_for("mosaic_gpu", cases.problem(rows=33), "NVIDIA H200") == Blocks()
    assert tuning.blocks_for("mosaic_gpu", cases.problem(rows=17), "NVIDIA H100") == Blocks()


def test_a_broken_file_is_named(folder) -> None:
    (folder / "cpu.json").write_text('{"entries": [{"blocks": {"width": 3}}]}')
    with pytest.raises(ValueError, match=r"cpu\.json holds no tuned block sizes"):
        tuning.read("cpu")


def test_the_dispatcher_takes_what_was_measured(folder) -> None:
    step = DECODES["bf16"]

    def lowered() -> str:
        # A function of its own each time: one traced before is not traced again.
        return lowered_for(V6E, types.SimpleNamespace(batch=step.batch, attend=lambda batch: step.attend(batch)))

    before = lowered()
    sizes = {"q_heads": 32, "rows": step.rows, "tokens": step.tokens, "max_pages": 64}
    entry = tuning.Entry(tuning.case_of("pallas_tpu", cases.problem(**sizes)), Blocks(decode_keys=128), 1.0, 2.0)
    tuning.write(V6E.device_kind, [entry], {})
    assert lowered() != before


@pytest.mark.parametrize("blocks", [Blocks(decode_keys=32), Blocks(prefill_keys=32, prefill_queries=16)], ids=str)
def test_results_do_not_depend_on_blocks(blocks: Blocks) -> None:
    batch = cases.build(cases.Shape(2, 1, 128), [70, 33], [1, 20])
    out = paged_attention(*batch, max_query_len=20, implementation="pallas_tpu", blocks=blocks)
    expected, _ = cases.dense_attention(batch)
    np.testing.assert_allclose(np.asarray(out)[:21], expected[:21], rtol=1e-5, atol=1e-5)


def test_backends_without_blocks_say_so() -> None:
    with pytest.raises(NotImplementedError, match="'xla' has no block sizes"):
        tuning.candidates("xla", cases.problem())
