"""Measured knobs: figures put into files come back, and files that are none are clear errors."""

import json
import pathlib

import pytest

from attention_offload.costs.calibration import from_attention, from_engine, from_linear, write_knobs
from attention_offload.costs.deployments import CoupledDeployment
from attention_offload.costs.knobs import A_PRIORI, load_knobs
from attention_offload.costs.model_table import load_shape
from attention_offload.devices import load_devices
from attention_offload.errors import OffloadError

H100 = load_devices()["h100"]
SHAPE = load_shape("llama3-8b")


def write(path: pathlib.Path, content: object) -> pathlib.Path:
    path.write_text(json.dumps(content))
    return path


def test_benches_give_the_efficiencies_that_made_them(tmp_path: pathlib.Path) -> None:
    """Rows made up for 60 % of the memory bandwidth and 50 % of the FLOP/s, on one of four parts of the device."""
    rows = []
    for count in (1, 8, 64, 4096):
        seconds = max(1 / (0.6 * H100.memory_bandwidth), count / (0.5 * H100.peak_flops()))
        slower = 2 * seconds
        for name, taken in (("ours", seconds), ("theirs", slower)):
            gb_s = 1 / taken / 1e9 / 4
            rows.append({"implementation": name, "dtype": "bfloat16", "rows": count, "gb_s": gb_s})
    linear = write(tmp_path / "linear.json", {"rows": rows})
    attention = write(tmp_path / "attention.json", {"rows": [{"gb_s": 700.0}, {"gb_s": 650.0}, {"other": 1}]})
    measured = [*from_linear(linear, H100, scale=4), *from_attention(attention, H100, scale=4)]
    knobs = write_knobs(tmp_path / "knobs.json", measured)
    assert knobs.gemm_bandwidth_share(8) == pytest.approx(0.6)
    assert knobs.gemm_flops_efficiency == pytest.approx(0.5)
    assert knobs.attention_memory_efficiency == pytest.approx(2800e9 / H100.memory_bandwidth)
    assert load_knobs("measured", tmp_path / "knobs.json") == knobs
    assert knobs.coupled_overhead_s == A_PRIORI.coupled_overhead_s


@pytest.mark.parametrize("overhead_s", [0.0, 3e-3])
def test_an_engine_is_predicted_by_what_it_measured(tmp_path: pathlib.Path, overhead_s: float) -> None:
    costs = {
        "prefill_token": 2 * SHAPE.active_parameters / (0.4 * H100.peak_flops()),
        "decode_base": SHAPE.weight_bytes / (0.9 * H100.memory_bandwidth) + overhead_s,
        "decode_sequence": 5e-5,
        "decode_token": SHAPE.kv_bytes_per_token / (0.5 * H100.memory_bandwidth),
    }
    path = write(tmp_path / "calibration.json", {"costs": costs, "source": "made up"})
    knobs = write_knobs(tmp_path / "knobs.json", from_engine(path, H100, 1, SHAPE))
    assert knobs.attention_memory_efficiency == pytest.approx(0.5)
    assert knobs.gemm_flops_efficiency == pytest.approx(0.4)
    for batch, context in ((1, 500), (8, 4000)):
        step = CoupledDeployment(H100, 1).decode_step(SHAPE, batch, context, knobs)
        line = costs["decode_base"] + batch * costs["decode_sequence"] + batch * context * costs["decode_token"]
        # The line adds the arithmetic of a sequence, which the roofline hides behind reading the weights.
        hidden = 2 * SHAPE.active_parameters * batch / (0.4 * H100.peak_flops())
        assert line - hidden * 1.01 <= step.tbt_s <= line * 1.01


@pytest.mark.parametrize(
    ("content", "read", "message"),
    [
        ({"rows": [{"gb_s": 1}]}, lambda p: from_linear(p, H100), "has no rows with rows, dtype, gb_s"),
        ([], lambda p: from_attention(p, H100), "holds no measurement"),
        (
            {"rows": [{"rows": 64, "dtype": "bfloat16", "gb_s": 9}]},
            lambda p: from_linear(p, H100),
            "no measurement with 8 rows or fewer",
        ),
        ({"costs": {"prefill_token": 1}}, lambda p: from_engine(p, H100, 1, SHAPE), "is no calibration of an engine"),
        (
            {"rows": [{"gb_s": 99_000}]},
            lambda p: write_knobs(p, from_attention(p, H100)),
            r"Knob `attention_memory_efficiency` is a share between 0 and 1, got 29\.",
        ),
    ],
)
def test_files_that_are_no_measurement(tmp_path: pathlib.Path, content, read, message: str) -> None:
    with pytest.raises(OffloadError, match=message):
        read(write(tmp_path / "file.json", content))
    with pytest.raises(OffloadError, match="Cannot read the measurement"):
        read(tmp_path / "absent.json")
