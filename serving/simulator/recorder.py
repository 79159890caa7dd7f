"""What a run shows beside its outcomes: load over time, replicas of hot blocks, and a timeline for Perfetto."""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from serving.cluster.request_state import RequestState
from serving.conductor import Conductor
from serving.request import TraceRequest


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The cluster at one moment. Loads are predicted latencies over their SLOs, means over the instances of a pool;
    `replicas` by rank of the block.
    """

    time_s: float
    prefill_instances: int
    decode_instances: int
    prefill_load: float
    decode_load: float
    queued: int
    decoding: int
    deferred: int
    replicas: dict[int, int]


class Recorder:
    """Samples every `interval_s` seconds, and spans of every request if `timeline`."""

    def __init__(self, interval_s: float = 15.0, timeline: bool = False, watched: dict[int, int] | None = None) -> None:
        """`watched` maps a block's rank to its id, from `hottest_blocks`."""
        self.samples: list[Sample] = []
        self.next_sample_s = 0.0
        self._interval_s = interval_s
        self._watched = watched or {}
        self._spans: list[dict[str, Any]] | None = [] if timeline else None

    def sample(self, conductor: Conductor, now: float) -> None:
        mirror = conductor.mirror
        prefill_loads, decode_loads = conductor.loads(now)
        batches = [mirror.decode[index] for _, index in mirror.decode_order]
        self.samples.append(
            Sample(
                time_s=now,
                prefill_instances=len(prefill_loads),
                decode_instances=len(decode_loads),
                prefill_load=sum(prefill_loads.values()) / max(1, len(prefill_loads)),
                decode_load=sum(decode_loads.values()) / max(1, len(decode_loads)),
                queued=sum(len(mirror.prefill[index].queue) for _, index in mirror.prefill_order),
                decoding=sum(batch.present for batch in batches),
                deferred=conductor.deferred,
                replicas={rank: mirror.directory.holders(block).bit_count() for rank, block in self._watched.items()},
            )
        )
        self.next_sample_s = now - now % self._interval_s + self._interval_s

    def prefilled(self, state: RequestState, node: str, now: float) -> None:
        if self._spans is not None and state.started_s is not None:
            details = {"tokens": state.request.input_tokens, "reused": state.hit_tokens}
            self._spans.append(_span("prefill", node, state.request.id, state.started_s, now, details))

    def decoded(self, state: RequestState, node: str, now: float) -> None:
        if self._spans is not None and state.first_token_s is not None:
            earlier = state.resumed.tokens if state.resumed is not None else 0
            details = {"tokens": state.tokens - earlier, "tbt_s": state.tbt_s}
            self._spans.append(_span("decode", node, state.request.id, state.first_token_s, now, details))

    def write_timeline(self, path: str | os.PathLike[str]) -> None:
        """Writes Chrome trace events, which Perfetto opens: a process per node, overlapping decodes as async spans."""
        events: list[dict[str, Any]] = []
        nodes: dict[str, int] = {}
        for span in self._spans or ():
            node = span.pop("node")
            if node not in nodes:
                nodes[node] = len(nodes) + 1
                events.append({"ph": "M", "name": "process_name", "pid": nodes[node], "args": {"name": node}})
            base = span | {"pid": nodes[node], "tid": 1, "cat": span["name"]}
            end_us = base.pop("end_us")
            events.append(base | {"ph": "b"})
            events.append(base | {"ph": "e", "ts": end_us, "args": {}})
        pathlib.Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _span(name: str, node: str, request: str, start_s: float, end_s: float, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "node": node, "id": request, "ts": start_s * 1e6, "end_us": end_s * 1e6, "args": args}


def hottest_blocks(requests: Iterable[TraceRequest], ranks: Iterable[int] = (10, 100, 1000, 10000)) -> dict[int, int]:
    """Ids of the blocks at these ranks of reference counts, the hottest being rank 1."""
    counts = collections.Counter(block for request in requests for block in request.keys)
    ranked = counts.most_common(max(ranks))
    return {rank: ranked[rank - 1][0] for rank in ranks if rank <= len(ranked)}
