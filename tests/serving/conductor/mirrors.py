"""Mirrors built by hand: what the Conductor believes, without a cluster behind it."""

from collections.abc import Iterable, Sequence

from kvcache.prefix_index import PrefixIndex
from serving.conductor.links import Links
from serving.conductor.mirror import Assignment, ClusterMirror, DecodeMirror, PrefillMirror
from serving.conductor.types import Placement
from serving.request import Request
from serving.simulator.performance import mooncake_a800

COSTS = mooncake_a800().costs
SIZE = 512


def mirror_of(
    queues_s: Sequence[float],
    batches: Sequence[int] = (),
    held: Sequence[Iterable[int]] = (),
    capacity_tokens: int = 10**6,
) -> ClusterMirror:
    """Prefill instances with so many seconds of work before the next request, and decode instances of so many requests.

    Args:
        batches: by decode instance, the requests of 1,000 tokens that it decodes.
        held: by prefill instance, the blocks that it holds.
    """
    prefill = [PrefillMirror(name=f"p{i}", index=i, queued_s=seconds) for i, seconds in enumerate(queues_s)]
    decode = [
        DecodeMirror(name=f"d{i}", index=i, link=len(prefill) + i, kv_capacity_tokens=capacity_tokens)
        for i in range(len(batches))
    ]
    mirror = ClusterMirror(
        prefill=prefill,
        decode=decode,
        block_size=SIZE,
        links=Links([1] * (len(prefill) + len(decode))),
        decode_s=COSTS.decode_s,
        link_token_s=COSTS.transfer_token,
        directory=PrefixIndex(),
    )
    for index, seconds in enumerate(queues_s):
        mirror.prefill_order.set(index, seconds)
    for index, blocks in enumerate(held):
        mirror.directory.add(index, blocks)
    for index, batch in enumerate(batches):
        for i in range(batch):
            mirror.reserve(decoding(f"of d{index}, {i}", index))
        decode[index].present, decode[index].present_tokens = batch, 1000 * batch
        mirror.decode_order.set(index, COSTS.decode_s(batch, 1000 * batch))
    return mirror


def decoding(name: str, decode: int) -> Assignment:
    """A request of 1,000 tokens that has decoded for no time yet."""
    placement = Placement(
        prefill=0,
        decode=decode,
        reused_tokens=0,
        source=None,
        fetched_tokens=0,
        predicted_queue_s=0.0,
        predicted_fetch_s=0.0,
        predicted_prefill_s=0.0,
        predicted_tbt_s=0.0,
        queue_key=0.0,
    )
    return Assignment(
        number=0,
        request=Request(id=name, input_tokens=1000),
        placement=placement,
        placed_s=0.0,
        prefill_end_s=0.0,
        work_s=0.0,
        turn_s=0.0,
        output_tokens=256.0,
        decode_start_s=0.0,
        present=True,
    )
