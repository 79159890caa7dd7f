"""Closed forms of the cost model against the paper's numbers, brute force, and the laws that times and bytes obey."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_offload.costs.knobs import A_PRIORI, FITTED, IDEAL, load_knobs
from attention_offload.costs.model_table import NAMES, load_shape
from attention_offload.costs.operators import (
    attention_time,
    dense_time,
    minimum_bandwidth,
    p_norm,
    prefill_time,
)
from attention_offload.costs.shapes import FORMAT_BYTES, ModelShape
from attention_offload.costs.workloads import DecodeWorkload
from attention_offload.devices import Device, load_devices
from attention_offload.errors import OffloadError
from model.presets import PRESETS

DEVICES = load_devices("paper")
H100, H20 = DEVICES["h100"], DEVICES["h20"]
LLAMA3 = load_shape("llama3-70b")
batches = st.integers(1, 2000)
contexts = st.integers(1, 100_000)
shapes = st.sampled_from([load_shape(name) for name in NAMES])
knob_sets = st.sampled_from([IDEAL, A_PRIORI, FITTED])


def attention_intensity(shape: ModelShape) -> float:
    """FLOP per byte of decode attention, whatever the batch and the context."""
    return shape.attention_flops / shape.kv_bytes_per_token


def test_intensities_of_section_2() -> None:
    N, d, B, e = LLAMA3.parameters, LLAMA3.hidden_size, 64, 2
    # Below the ridge, dense operators take as long as their bytes.
    traffic = dense_time(LLAMA3, H100, 1, B, IDEAL) * H100.memory_bandwidth
    assert 2 * N * B / traffic == pytest.approx(2 * N * B / (e * (N + 2 * B * d)))
    for name, group in (("llama-65b", 1), ("llama3-8b", 4), ("llama3-70b", 8)):
        assert attention_intensity(load_shape(name)) == pytest.approx(2 * group / e)
    assert H100.ridge() == pytest.approx(295, rel=2e-3)
    assert H20.ridge() == pytest.approx(37, rel=2e-3)
    assert DEVICES["tpu-v6e"].ridge() == pytest.approx(560, rel=2e-3)


def test_kv_and_crossing_bytes_of_the_paper() -> None:
    per_token = {"llama-33b": 1.597e6, "llama-65b": 2.621e6, "llama3-70b": 0.328e6}
    for name, expected in per_token.items():
        assert load_shape(name).kv_bytes_per_token == pytest.approx(expected, rel=2e-3)
    assert 80e9 / (8192 * LLAMA3.kv_bytes_per_token) == pytest.approx(29.8, abs=0.05)
    assert LLAMA3.crossing_bytes == (2 + 2 / 8) * 2 * LLAMA3.hidden_size


def test_30_gb_per_s_suffice_for_300_sequences() -> None:
    def need(context: float) -> float:
        return minimum_bandwidth(LLAMA3, (H100, 1), (H20, 1), 300, context, A_PRIORI)

    assert [round(need(context) / 1e9) for context in (1024, 4096, 8192)] == [41, 21, 13]
    assert need(4096) < 30e9


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_experts_read_against_every_routing(batch: int) -> None:
    """The expected number of distinct experts, by enumerating all routings of a tiny router."""
    experts, routed = 4, 2
    shape = dataclasses.replace(
        load_shape("mixtral-8x7b"),
        num_experts=experts,
        experts_per_token=routed,
        parameters=10.0,
        expert_parameters=2.0,
    )
    choices = list(itertools.combinations(range(experts), routed))
    chance_missed = sum(0 not in choice for choice in choices) / len(choices)
    touched = experts * (1 - chance_missed**batch)
    assert shape.weights_read(batch) == pytest.approx((10 - experts * 2 + touched * 2) * 2)


def test_windows_hide_context_layer_by_layer() -> None:
    shape = dataclasses.replace(LLAMA3, window=1000, windowed_layers=60)
    for context in (10, 1000, 5000):
        per_layer = [min(context, 1000) if layer < 60 else context for layer in range(80)]
        assert shape.attended(context) == pytest.approx(sum(per_layer) / 80)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=20))
def test_workload_context_against_every_step(pairs: list[tuple[int, int]]) -> None:
    contexts = [prompt + step for prompt, generated in pairs for step in range(generated)]
    if not contexts or not sum(contexts) or not sum(p for p, g in pairs if g):
        return
    workload = DecodeWorkload.from_lengths("w", pairs)
    assert workload.context == pytest.approx(np.mean(contexts))
    assert workload.mean_generated == pytest.approx(np.mean([g for _, g in pairs if g]))


def test_latent_attention_is_compute_bound_on_memory_devices() -> None:
    deepseek = load_shape("deepseek-v3")
    assert deepseek.kv_bytes_per_token == 61 * 576 * 2
    assert deepseek.parameters == pytest.approx(671e9, rel=5e-3)
    assert deepseek.active_parameters == pytest.approx(37.5e9, rel=5e-3)
    assert attention_intensity(deepseek) > 6 * H20.ridge()


def test_quantised_shapes_carry_their_scales() -> None:
    shape = LLAMA3.quantised(weights="int4", kv="int8")
    assert shape.weight_bytes == LLAMA3.weight_bytes / 4
    assert shape.kv_bytes_per_token == pytest.approx(LLAMA3.kv_bytes_per_token * (1 + 4 / 128) / 2)
    assert shape.compute_format == "bfloat16"
    assert LLAMA3.quantised(weights="float8_e4m3fn").compute_format == "float8_e4m3fn"
    with pytest.raises(OffloadError, match="`kv_format` 'int7' is not known; known: float32"):
        LLAMA3.quantised(kv="int7")


def test_other_families_count_as_gated_decoders() -> None:
    fields = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = ModelShape.from_hf({"model_type": "gemma3", "intermediate_size": 128, **fields})
    assert shape.parameters == 2 * 1000 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    with pytest.raises(OffloadError, match="`kv_lora_rank` but lacks qk_rope_head_dim"):
        ModelShape.from_hf({"kv_lora_rank": 512, **fields})
    with pytest.raises(
        OffloadError, match=r"No model `llama-1t`; did you mean `llama-13b`\? Known: bench-58m, llama-13b"
    ):
        load_shape("llama-1t")


@given(st.floats(0, 1e3), st.floats(0, 1e3), st.floats(1, 20))
def test_p_norm_lies_between_the_corner_and_the_sum(x: float, y: float, p: float) -> None:
    assert max(x, y) <= p_norm(x, y, p) * (1 + 1e-9)
    assert p_norm(x, y, p) <= (x + y) * (1 + 1e-9)
    assert p_norm(x, y, math.inf) == max(x, y)


@given(shapes, batches, contexts, knob_sets, st.sampled_from([1, 2, 4, 8]))
def test_times_grow_with_work(shape, batch, context, knobs, count) -> None:
    assert dense_time(shape, H100, count, batch + 1, knobs) >= dense_time(shape, H100, count, batch, knobs)
    now = attention_time(shape, H20, count, batch, context, knobs)
    assert attention_time(shape, H20, count, batch + 1, context, knobs) > now
    assert attention_time(shape, H20, count, batch, context + 1, knobs) >= now
    assert attention_time(shape, H20, count + 1, batch, context, knobs) < now
    assert prefill_time(shape, H100, count, context, 0, knobs) >= prefill_time(
        shape, H100, count, context, context // 2, knobs
    )


@given(shapes, batches, contexts, st.floats(0.1, 10))
def test_a_device_k_times_as_fast_takes_one_kth_of_the_time(shape, batch, context, k) -> None:
    """The dimensions: with no fixed overheads every time is work over a rate."""
    faster = _scaled(H20, k)
    for count in (1, 4):
        assert dense_time(shape, faster, count, batch, IDEAL) == pytest.approx(
            dense_time(shape, H20, count, batch, IDEAL) / k
        )
        assert attention_time(shape, faster, count, batch, context, IDEAL) == pytest.approx(
            attention_time(shape, H20, count, batch, context, IDEAL) / k
        )


@given(shapes, batches, contexts, st.sampled_from(sorted(FORMAT_BYTES)))
@settings(max_examples=50)
def test_narrower_kv_is_never_slower(shape, batch, context, fmt) -> None:
    if FORMAT_BYTES[fmt] > 2:
        return
    quantised = shape.quantised(kv=fmt)
    assert quantised.kv_bytes_per_token <= shape.kv_bytes_per_token
    assert attention_time(quantised, H20, 2, batch, context, A_PRIORI) <= attention_time(
        shape, H20, 2, batch, context, A_PRIORI
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dense_time(LLAMA3, H100, 0, 1, IDEAL), "`tp` must be positive, got 0"),
        (lambda: attention_time(LLAMA3, H20, 1, -1, 5, IDEAL), "`batch` must be positive, got -1"),
        (lambda: A_PRIORI.changed(tbt=1), "No knob tbt; known: .*attention_flops_efficiency"),
        (lambda: A_PRIORI.changed(link_efficiency=1.5), "`link_efficiency` is a share between 0 and 1, got 1.5"),
        (lambda: A_PRIORI.changed(offload_overhead_s=-1), "`offload_overhead_s` is a time .* got -1"),
        (lambda: load_knobs("guess"), "No knobs `guess`; known: ideal, a_priori, fitted, modern, measured"),
        (lambda: load_knobs("measured"), "`measured` need a calibration file"),
        (lambda: DecodeWorkload.from_lengths("w", [(5, 0)]), "`w` has no request that generates a token"),
        (lambda: DecodeWorkload.from_means("w", -5, 1), "`mean_prompt` must be positive, got -5"),
    ],
)
def test_bad_input_is_a_clear_error(call, message: str) -> None:
    with pytest.raises(OffloadError, match=message):
        call()


def _scaled(device: Device, k: float) -> Device:
    return dataclasses.replace(
        device,
        flops={dtype: k * value for dtype, value in device.flops.items()},
        memory_bandwidth=k * device.memory_bandwidth,
        link_bandwidth=k * device.link_bandwidth,
    )


@pytest.mark.parametrize(
    ("quantisation", "weights", "kv"),
    [
        (None, "bfloat16", "bfloat16"),
        ({"quant_method": "fp8"}, "float8_e4m3fn", "bfloat16"),
        ({"quant_method": "awq", "bits": 4}, "int4", "bfloat16"),
        ({"quant_method": "gptq", "bits": 8}, "int8", "bfloat16"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "int4", "bfloat16"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
                "kv_cache_scheme": {"num_bits": 8, "type": "float"},
            },
            "float8_e4m3fn",
            "float8_e4m3fn",
        ),
    ],
)
def test_formats_of_a_quantised_config(quantisation: dict | None, weights: str, kv: str) -> None:
    shape = ModelShape.from_hf(PRESETS["llama3-8b"].to_hf() | {"quantization_config": quantisation})
    assert (shape.weight_format, shape.kv_format) == (weights, kv)


def test_an_unknown_quantisation_is_a_clear_error() -> None:
    config = PRESETS["llama3-8b"].to_hf() | {"quantization_config": {"quant_method": "hqq", "bits": 3}}
    with pytest.raises(OffloadError, match="`llama` is quantised by `hqq` with 3 bits, whose size is not known"):
        ModelShape.from_hf(config)
