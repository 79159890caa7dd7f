"""The same cluster, simulated token by token with naive data structures: what the fast simulator must equal.

It shares the cost formula with the simulator and nothing else: placement, caches, queues, batches and gaps are anew.
"""

import dataclasses
import heapq
import itertools

from serving.request import TraceRequest
from serving.simulator.performance import Performance
from serving.workload.outcomes import tbt_s


@dataclasses.dataclass
class Job:
    request: TraceRequest
    reused: int = 0
    prefill: int = 0
    decode: int = 0
    fetched_s: float = 0.0
    prefill_s: float = 0.0
    done: int = 0
    ttft_s: float = 0.0
    finished_s: float = 0.0
    last_token_s: float = 0.0
    gaps: list[float] = dataclasses.field(default_factory=list)
    started_s: float = 0.0


class Node:
    def __init__(self) -> None:
        self.cache: list[int] = []
        self.queue: list[Job] = []
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.assigned: list[Job] = []
        self.busy_until_s = 0.0
        self.active = False
        self.send_free_s = self.receive_free_s = 0.0


class BruteForce:
    def __init__(
        self, performance: Performance, prefill: int, decode: int, coupled: int, blocks: int, size: int, chunk: int = 0
    ) -> None:
        self.performance, self.costs, self.decode_times = performance, performance.costs, performance.decode_times
        self.size, self.blocks, self.chunk = size, blocks, chunk
        self.coupled = bool(coupled)
        self.prefill = [Node() for _ in range(coupled or prefill)]
        self.decode = self.prefill if coupled else [Node() for _ in range(decode)]
        self.events: list = []
        self.count = itertools.count()

    def at(self, time: float, action, *arguments) -> None:
        heapq.heappush(self.events, (time, next(self.count), action, arguments))

    def run(self, requests: tuple[TraceRequest, ...]) -> list[Job]:
        jobs = [Job(request) for request in requests]
        for job in jobs:
            self.at(job.request.arrival_s, self.arrive, job)
        while self.events:
            time, _, action, arguments = heapq.heappop(self.events)
            action(time, *arguments)
        return jobs

    def match(self, node: Node, request: TraceRequest) -> int:
        held = list(itertools.takewhile(node.cache.__contains__, request.keys))
        return min(len(held) * self.size, request.input_tokens - 1)

    def touch(self, node: Node, blocks: tuple[int, ...]) -> None:
        for block in reversed(blocks):
            if block in node.cache:
                node.cache.remove(block)
            node.cache.append(block)
        del node.cache[: max(0, len(node.cache) - self.blocks)]

    def arrive(self, now: float, job: Job) -> None:
        request = job.request
        if self.coupled:
            job.prefill = min(range(len(self.prefill)), key=lambda i: (len(self.prefill[i].assigned), i))
            job.decode, job.reused = job.prefill, self.match(self.prefill[job.prefill], request)
            source = None
        else:
            source = self.algorithm_1(now, job)
            self.choose_decode(job)
        node = self.prefill[job.prefill]
        job.prefill_s = self.costs.prefill_s(request.input_tokens, job.reused)
        if source is not None:
            fetched = job.reused - self.match(node, request)
            job.fetched_s = self.transfer(self.prefill[source], node, now, fetched)
        self.touch(node, request.keys)
        self.decode[job.decode].assigned.append(job)
        node.queue.append(job)
        if not node.active:
            self.boundary(now, node) if self.coupled else self.start_prefill(now, node)

    def algorithm_1(self, now: float, job: Job) -> int | None:
        request = job.request
        matches = [self.match(node, request) for node in self.prefill]
        longest = max(matches)
        best = None
        # Ties: the longest local match first; without one, whoever has been idle longest.
        ties = [
            (-m, 0.0 if m else node.busy_until_s, i)
            for i, (m, node) in enumerate(zip(matches, self.prefill, strict=True))
        ]
        for _, _, i in sorted(ties):
            node = self.prefill[i]
            queue_s = max(0.0, node.busy_until_s - now) + sum(queued.prefill_s for queued in node.queue)
            if longest > matches[i]:
                waits = [
                    (max(0.0, self.prefill[j].send_free_s - now, node.receive_free_s - now), j)
                    for j in range(len(matches))
                    if matches[j] == longest
                ]
                wait_s, source = min(waits[:4])
                cost = queue_s + (wait_s + self.costs.transfer_token * (longest - matches[i]))
                cost += self.costs.prefill_s(request.input_tokens, longest)
                option = (cost, i, longest, source)
            else:
                option = (queue_s + self.costs.prefill_s(request.input_tokens, matches[i]), i, matches[i], None)
            if best is None or option[0] < best[0]:
                best = option
        _, job.prefill, job.reused, source = best
        return source

    def choose_decode(self, job: Job) -> None:
        def load(i: int) -> tuple[float, int]:
            assigned = self.decode[i].assigned
            return self.decode_times.decode_s(len(assigned), sum(a.request.input_tokens for a in assigned)), i

        job.decode = min(range(len(self.decode)), key=load)

    def transfer(self, sender: Node, receiver: Node, earliest_s: float, tokens: int) -> float:
        end_s = max(earliest_s, sender.send_free_s, receiver.receive_free_s) + self.costs.transfer_token * tokens
        sender.send_free_s = receiver.receive_free_s = end_s
        return end_s

    def start_prefill(self, now: float, node: Node) -> None:
        node.active = bool(node.queue)
        if node.queue:
            job = node.queue.pop(0)
            job.started_s = now
            duration_s = max(job.prefill_s, self.performance.load_token * job.reused, job.fetched_s - now)
            node.busy_until_s = now + duration_s
            self.at(node.busy_until_s, self.end_prefill, job, node)

    def end_prefill(self, now: float, job: Job, node: Node) -> None:
        self.start_prefill(now, node)
        self.first_token(now, job)
        if job.request.output_tokens > 1:
            tokens = job.request.input_tokens
            sent_s = self.transfer(node, self.decode[job.decode], job.started_s, tokens)
            last_layer_s = self.costs.transfer_token * tokens / self.performance.layers
            self.at(max(sent_s, now + last_layer_s), self.join, job)

    def first_token(self, now: float, job: Job) -> None:
        job.ttft_s, job.last_token_s, job.done = now - job.request.arrival_s, now, 1
        if job.request.output_tokens == 1:
            self.end(now, job)

    def end(self, now: float, job: Job) -> None:
        job.finished_s = now
        self.decode[job.decode].assigned.remove(job)

    def join(self, now: float, job: Job) -> None:
        node = self.decode[job.decode]
        node.waiting.append(job)
        if not node.active:
            self.boundary(now, node)

    def boundary(self, now: float, node: Node) -> None:
        """An iteration may begin."""
        node.active = True
        if self.coupled and node.queue and not self.chunk:
            job = node.queue[0]
            self.at(now + job.prefill_s, self.stalled, job, node)
            return
        while node.waiting:
            held = sum(job.request.input_tokens + job.request.output_tokens for job in node.running)
            request = node.waiting[0].request
            if (
                node.running
                and held + request.input_tokens + request.output_tokens > self.performance.kv_capacity_tokens
            ):
                break
            node.running.append(node.waiting.pop(0))
        tokens = sum(job.request.input_tokens + job.done for job in node.running)
        seconds = self.decode_times.decode_s(len(node.running), tokens) if node.running else 0.0
        piece = 0
        if self.coupled and node.queue:
            job = node.queue[0]
            begin = job.reused + job.done
            piece = min(self.chunk, job.request.input_tokens - begin)
            seconds += self.costs.prefill_s(begin + piece, begin) - self.costs.prefill_s(begin, begin)
            if job.done == 0:
                seconds += self.costs.prefill_s(job.reused, job.reused)
        if not node.running and not piece:
            node.active = False
            return
        self.at(now + seconds, self.iterated, node, piece)

    def stalled(self, now: float, job: Job, node: Node) -> None:
        node.queue.remove(job)
        self.first_token(now, job)
        if job.request.output_tokens > 1:
            node.waiting.append(job)
        self.boundary(now, node)

    def iterated(self, now: float, node: Node, piece: int) -> None:
        for job in list(node.running):
            job.gaps.append(now - job.last_token_s)
            job.last_token_s = now
            job.done += 1
            if job.done == job.request.output_tokens:
                node.running.remove(job)
                self.end(now, job)
        if piece:
            job = node.queue[0]
            job.done += piece
            if job.reused + job.done == job.request.input_tokens:
                node.queue.pop(0)
                self.first_token(now, job)
                if job.request.output_tokens > 1:
                    node.waiting.append(job)
        self.boundary(now, node)


def tbt(job: Job) -> float | None:
    return tbt_s(job.gaps)
