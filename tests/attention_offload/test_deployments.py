"""Deployments for decode: capacity, the pipeline's round time simulated as well, and what more devices gain."""

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_offload.costs.deployments import CoupledDeployment, OffloadedDeployment, balanced_count, max_batch
from attention_offload.costs.knobs import A_PRIORI, FITTED, IDEAL, NCCL
from attention_offload.costs.model_table import load_shape
from attention_offload.costs.partial import PartiallyOffloadedDeployment
from attention_offload.devices import load_devices
from attention_offload.errors import CapacityError, OffloadError

DEVICES = load_devices("paper")
H100, H20 = DEVICES["h100"], DEVICES["h20"]
LLAMA3, LLAMA65 = load_shape("llama3-70b"), load_shape("llama-65b")
contexts = st.integers(100, 20_000)


def dop(dense_count: int, attention_count: int, **changes: Any) -> OffloadedDeployment:
    """DOP(a, b) of the paper, on its devices."""
    devices = {"dense": H100, "dense_count": dense_count, "attention": H20, "attention_count": attention_count}
    return OffloadedDeployment(**(devices | changes))


def simulated_round(n: int, dense_s: float, attention_s: float, network_s: float, rounds: int = 400) -> float:
    """Time per layer of n batches on n - 1 replicas and one attention pool, each slice started as soon as it may."""
    replicas, pool = [0.0] * max(n - 1, 1), 0.0
    ready = [0.0] * n
    for layer, batch in itertools.product(range(rounds), range(n)):
        replica = (layer + batch) % len(replicas)
        sent = max(ready[batch], replicas[replica]) + dense_s
        replicas[replica] = sent
        pool = max(pool, sent + network_s) + attention_s
        ready[batch] = pool
    return max(ready) / rounds


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@given(st.floats(0.01, 10), st.floats(0.01, 10), st.floats(0, 5))
@settings(max_examples=40)
def test_round_time_is_that_of_the_simulated_pipeline(n: int, dense_s: float, attention_s: float, net_s: float) -> None:
    closed = max(n * attention_s, n * dense_s / (n - 1), dense_s + attention_s + net_s)
    simulated = simulated_round(n, dense_s, attention_s, net_s)
    # Filling the pipeline costs the simulation a few slots of its 400 rounds.
    assert simulated == pytest.approx(closed, rel=0.03)


def test_step_is_the_round_time_of_its_parts() -> None:
    deployment = dop(2, 4, in_flight=3)
    step = deployment.decode_step(LLAMA3, 300, 4096, A_PRIORI)
    alone = step.dense_s + step.attention_s + step.network_s - step.overlap_s
    round_s = max(3 * step.attention_s, 3 * step.dense_s / 2, alone)
    assert step == deployment.staggered_step(LLAMA3, 300, 4096, A_PRIORI, 3)
    assert step.tbt_s == pytest.approx(round_s + step.overhead_s)
    assert step.tokens_per_s == 300 / step.tbt_s


@given(st.integers(1, 400), contexts, st.integers(2, 4))
@settings(max_examples=50)
def test_staggering_is_chosen_only_where_it_pays(batch: int, context: int, n: int) -> None:
    deployment = dop(2, 4, in_flight=n)
    ways = [deployment.staggered_step(LLAMA65, batch, context, A_PRIORI, k).tbt_s for k in (1, n)]
    assert deployment.decode_step(LLAMA65, batch, context, A_PRIORI).tbt_s == min(ways)


def test_a_slow_wire_is_busy_with_one_batch_at_a_time() -> None:
    slow = dataclasses.replace(H20, network_bandwidth=1e8)
    step = dop(2, 4, attention=slow).staggered_step(LLAMA65, 200, 100, IDEAL, 2)
    out = 200 * 80 * (LLAMA65.query_bytes + LLAMA65.kv_crossing_bytes) / 4e8
    assert step.tbt_s == pytest.approx(out)


def test_pool_is_sized_so_that_both_sides_take_equally_long() -> None:
    """t_a = t_m / (n - 1), against every pool size; only pools that hold the batch count."""
    deployment, counts = dop(2, 1), range(1, 17)

    def apart(count: int) -> float:
        step = dataclasses.replace(deployment, attention_count=count, partition="sequence").staggered_step(
            LLAMA3, 400, 8192, A_PRIORI, 2
        )
        return abs(step.attention_s - step.dense_s)

    sized = dataclasses.replace(deployment, partition="sequence")
    chosen = balanced_count(sized, LLAMA3, 400, 8192, A_PRIORI, counts)
    needed = 400 * 8192 * LLAMA3.kv_bytes_per_token / (0.95 * H20.memory_bytes)
    assert chosen == min((count for count in counts if count >= needed), key=apart)
    with pytest.raises(CapacityError, match=r"400 sequences of 8192 tokens .* 4xh20 offer 364.8 GB"):
        balanced_count(sized, LLAMA3, 400, 8192, A_PRIORI, (1, 2, 4))


def test_costs_of_table_5() -> None:
    assert dop(1, 2).price_per_hour == pytest.approx(20.32)
    assert dop(2, 4).price_per_hour == pytest.approx(40.64)
    assert CoupledDeployment(H100, 2).price_per_hour == pytest.approx(22.12)
    assert CoupledDeployment(H100, 4).price_per_hour == pytest.approx(44.24)
    assert dop(1, 2, in_flight=4).price_per_hour == pytest.approx(3 * 11.06 + 2 * 4.63)


@given(contexts, st.integers(3, 8))
def test_capacity_is_what_fits_and_no_more(context: int, count: int) -> None:
    for deployment in (CoupledDeployment(H100, count), dop(2, count)):
        batch = max_batch(deployment, LLAMA3, context, A_PRIORI)
        request = LLAMA3.kv_bytes_per_token * context
        assert batch * request <= deployment.kv_bytes(LLAMA3, A_PRIORI) < (batch + 1) * request


@given(contexts, st.integers(1, 7), st.sampled_from([IDEAL, A_PRIORI, FITTED]), st.sampled_from([1, 2, 3, 4]))
def test_more_attention_devices_never_hurt(context: int, b: int, knobs, n: int) -> None:
    def best(count: int) -> float:
        deployment = dop(2, count, in_flight=n, partition="sequence")
        batch = max_batch(deployment, LLAMA65, context, knobs)
        return deployment.decode_step(LLAMA65, batch, context, knobs).tokens_per_s

    if b & (b + 1) == 0:  # 2, 4, 8 devices divide the heads, so no token of a head is spread
        assert best(b + 1) >= best(b) * 0.98


@given(contexts, st.integers(8, 200))
def test_each_refinement_pays(context: int, batch: int) -> None:
    deployment = dop(2, 4, in_flight=1)

    def tbt(knobs) -> float:
        return deployment.decode_step(LLAMA65, batch, context, knobs).tbt_s

    assert tbt(A_PRIORI) < tbt(A_PRIORI.changed(overlap=False)) < tbt(A_PRIORI.changed(overlap=False, network=NCCL))
    assert tbt(IDEAL) < tbt(A_PRIORI)


def test_partitions() -> None:
    """By sequence equals by head where heads divide; by request is never better balanced; odd counts need either."""
    four = dop(2, 4, in_flight=1, context_spread=1.0)
    steps = {
        partition: dataclasses.replace(four, partition=partition).decode_step(LLAMA3, 64, 4096, A_PRIORI)
        for partition in ("head", "sequence", "request")
    }
    assert steps["head"] == steps["sequence"]
    assert steps["request"].attention_s > steps["head"].attention_s
    with pytest.raises(OffloadError, match=r"3 attention devices cannot share the 8 KV heads of llama3-70b evenly"):
        dop(2, 3).decode_step(LLAMA3, 64, 4096, A_PRIORI)
    odd = dop(2, 3, in_flight=1, partition="sequence").decode_step(LLAMA3, 64, 4096, A_PRIORI)
    assert odd.network_s > steps["head"].network_s


@given(st.integers(1, 400), contexts)
@settings(max_examples=50)
def test_help_from_prefill_devices_finds_the_best_share(batch: int, context: int) -> None:
    helped = PartiallyOffloadedDeployment(device=H100, count=4, helper=H100, helper_count=4, helper_tp=4)
    if batch > max_batch(helped, LLAMA65, context, A_PRIORI):
        return
    step = helped.decode_step(LLAMA65, batch, context, A_PRIORI)
    alone = CoupledDeployment(H100, 4).decode_step(LLAMA65, batch, context, A_PRIORI)
    if batch <= max_batch(CoupledDeployment(H100, 4), LLAMA65, context, A_PRIORI):
        assert step.tbt_s <= alone.tbt_s * (1 + 1e-9)
    assert step.attention_s <= alone.attention_s * (1 + 1e-9)


def test_helpers_add_memory_and_no_price() -> None:
    helped = PartiallyOffloadedDeployment(device=H100, count=4, helper=H100, helper_count=4, helper_tp=4)
    alone = CoupledDeployment(H100, 4)
    assert helped.price_per_hour == alone.price_per_hour
    assert max_batch(helped, LLAMA65, 4096, A_PRIORI) > 1.7 * max_batch(alone, LLAMA65, 4096, A_PRIORI)


def test_kv_heads_that_run_out_are_copied() -> None:
    sixteen = CoupledDeployment(dataclasses.replace(H100, memory_bytes=1e12), 16)
    assert sixteen.kv_bytes(LLAMA3, IDEAL) == pytest.approx((0.9 * 16e12 - LLAMA3.weight_bytes) / 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: max_batch(CoupledDeployment(H100, 1), LLAMA3, 100, IDEAL),
            CapacityError,
            r"weights of llama3-70b are 141.1 GB, but 1xh100 offer 72.0 GB. Use more or larger devices",
        ),
        (
            lambda: max_batch(dop(2, 1), LLAMA65, 100_000, IDEAL),
            CapacityError,
            r"2xh100\+1xh20 has 91.2 GB for KV, but one request of 100000 tokens of llama-65b needs 262.1 GB",
        ),
        (lambda: dop(2, 0), OffloadError, r"`attention_count` must be at least 1, got 0"),
        (lambda: dop(2, 1, in_flight=2, partition="block"), OffloadError, r"No partition `block`; known: head"),
    ],
)
def test_what_cannot_be_is_a_clear_error(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
