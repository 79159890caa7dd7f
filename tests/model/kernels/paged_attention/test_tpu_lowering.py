"""On TPU the dispatcher takes the TPU kernels: seen in what a step lowers to, on any machine and without a compiler."""

import dataclasses

import jax
import pytest

from tests.model.kernels.paged_attention.tpu_cases import CHUNKS, DECODES, V5P, V6E, Step, lowered_for


@pytest.mark.parametrize("device", [V6E, V5P], ids=["v6e", "v5p"])
@pytest.mark.parametrize("step", [DECODES["bf16"], DECODES["int8"]], ids=["bf16", "int8"])
def test_decode_is_one_kernel(device: jax.sharding.AbstractDevice, step: Step) -> None:
    text = lowered_for(device, step)
    assert text.count("@tpu_custom_call") == 1
    assert "paged_attention_decode" in text


def test_a_mixed_batch_is_a_kernel_for_its_chunks_and_one_for_the_rest() -> None:
    text = lowered_for(V6E, CHUNKS["bf16"])
    assert text.count("@tpu_custom_call") == 2
    assert "paged_attention_prefill" in text


def test_what_the_kernels_do_not_take_well_goes_to_xla() -> None:
    """Pools with heads of 64 that do not share rows would be copied on their way into a kernel."""
    assert "@tpu_custom_call" not in lowered_for(V6E, dataclasses.replace(DECODES["int8"], head_dim=64))
