"""Experts on devices of their own: nothing of the model is lost, and rounds are those of the simulated pools."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_offload.costs.deployments import CoupledDeployment, OffloadedDeployment, max_batch
from attention_offload.costs.experts import ExpertPoolDeployment, expert_time
from attention_offload.costs.knobs import A_PRIORI, IDEAL, NCCL
from attention_offload.costs.model_table import load_shape
from attention_offload.devices import load_devices
from attention_offload.errors import CapacityError, OffloadError

DEVICES = load_devices("paper")
H100, H20 = DEVICES["h100"], DEVICES["h20"]
QWEN, MIXTRAL = load_shape("qwen3-235b-a22b"), load_shape("mixtral-8x7b")
BASES = (CoupledDeployment(H20, 4), OffloadedDeployment(dense=H100, dense_count=1, attention=H20, attention_count=4))


@pytest.mark.parametrize("batch", [1, 40])
def test_expert_time_is_the_roofline_of_the_experts_alone(batch: int) -> None:
    touched = 128 * (1 - (1 - 8 / 128) ** batch)
    weights = touched * QWEN.expert_parameters * 2
    activations = 2 * 2 * batch * 8 * QWEN.hidden_size
    flops = 2 * 8 * QWEN.expert_parameters * batch
    expected = max((weights + activations) / (4 * H100.memory_bandwidth), flops / (4 * H100.peak_flops()))
    assert expert_time(QWEN, H100, 4, batch, IDEAL) == pytest.approx(expected)


def simulated_round(stays: tuple[float, ...], n: int, delay_s: float, rounds: int = 400) -> float:
    """Time per round of n batches that pass one pool after the other, each pool serving one batch at a time."""
    free, ready = [0.0] * len(stays), [0.0] * n
    for _, batch in itertools.product(range(rounds), range(n)):
        for pool, stay in enumerate(stays):
            free[pool] = ready[batch] = max(free[pool], ready[batch]) + stay
        ready[batch] += delay_s
    return max(ready) / rounds


@given(st.integers(2, 200), st.integers(200, 8000), st.sampled_from(BASES), st.integers(1, 8))
@settings(max_examples=40)
def test_round_is_that_of_the_simulated_pools(batch: int, context: int, base, count: int) -> None:
    deployment = ExpertPoolDeployment(base, H100, count)
    step = deployment.decode_step(QWEN, batch, context, A_PRIORI)
    slower = deployment.decode_step(QWEN, batch, context, A_PRIORI.changed(network=NCCL))
    assert step.tbt_s <= slower.tbt_s
    rounds = []
    for n in (1, 2):
        part = batch / n
        once = deployment.staggered_step(QWEN, part, context, A_PRIORI, 1)
        expert_s = expert_time(QWEN, H100, count, part, A_PRIORI)
        rest_s = once.dense_s - expert_s
        coupled = isinstance(base, CoupledDeployment)
        stays = (rest_s + once.attention_s, expert_s) if coupled else (rest_s, once.attention_s, expert_s)
        rounds.append(simulated_round(stays, n, once.network_s - once.overlap_s))
    overhead_s = A_PRIORI.offload_overhead_s + A_PRIORI.offload_sequence_overhead_s * batch
    assert step.tbt_s - overhead_s == pytest.approx(min(rounds), rel=0.02)


def test_memory_is_divided_and_nothing_is_lost() -> None:
    base = CoupledDeployment(H20, 4)
    experts = QWEN.num_experts * QWEN.expert_parameters * 2
    alone = 0.9 * 4 * H20.memory_bytes - (QWEN.weight_bytes - experts)
    pool = ExpertPoolDeployment(base, H100, 8)
    assert pool.kv_bytes(QWEN, A_PRIORI) == pytest.approx(alone)
    assert pool.price_per_hour == pytest.approx(base.price_per_hour + 8 * H100.price_per_hour)
    assert max_batch(pool, QWEN, 4096, A_PRIORI) > max_batch(CoupledDeployment(H20, 8), QWEN, 4096, A_PRIORI)
    with pytest.raises(CapacityError, match=r"The weights of qwen3-235b-a22b are 4\d\d.\d GB, but 4xh100"):
        ExpertPoolDeployment(base, H100, 4).kv_bytes(QWEN, A_PRIORI)


@given(st.integers(1, 300), st.integers(1, 7))
@settings(max_examples=30)
def test_more_expert_devices_never_hurt(batch: int, count: int) -> None:
    base = CoupledDeployment(H100, 1)
    few, many = (
        ExpertPoolDeployment(base, H20, c).decode_step(MIXTRAL, batch, 1000, A_PRIORI).tbt_s for c in (count, count + 1)
    )
    # A second copy of each token is sent where its two experts are no longer on one device.
    assert many <= few * (1.05 if count == 1 else 1 + 1e-9)


def test_what_cannot_be_is_a_clear_error() -> None:
    base = CoupledDeployment(H100, 4)
    with pytest.raises(OffloadError, match="llama3-70b has no experts"):
        ExpertPoolDeployment(base, H20, 1).decode_step(load_shape("llama3-70b"), 8, 1000, A_PRIORI)
    with pytest.raises(OffloadError, match="`expert_count` must be at least 1, got 0"):
        ExpertPoolDeployment(base, H20, 0)
    with pytest.raises(OffloadError, match="one replica of the rest"):
        ExpertPoolDeployment(dataclasses.replace(BASES[1], in_flight=3), H20, 1)
