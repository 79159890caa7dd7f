"""Seeded workloads: arrival processes, length distributions, and prompts that share prefixes, as a `Trace`."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from serving.request import TraceRequest
from serving.workload.errors import TraceError
from serving.workload.requests import Trace

Generator = np.random.Generator


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Log-normal token counts: `mean` tokens, coefficient of variation `cv` (0 = all equal), clipped to [low, high]."""

    mean: float
    cv: float = 0.0
    low: int = 1
    high: int = 1 << 20

    def __post_init__(self) -> None:
        if not (1 <= self.low <= self.mean <= self.high and self.cv >= 0):
            raise TraceError(
                f"lengths of mean {self.mean}, cv {self.cv} within [{self.low}, {self.high}] are not possible; "
                "use 1 <= low <= mean <= high and cv >= 0."
            )

    def draw(self, count: int, rng: Generator) -> np.ndarray:
        """int64 [count]."""
        sigma = np.log1p(self.cv**2) ** 0.5
        values = rng.lognormal(np.log(self.mean) - sigma**2 / 2, sigma, count)
        return np.clip(np.rint(values), self.low, self.high).astype(np.int64)


def arrivals(count: int, rate: float, rng: Generator, cv: float = 1.0) -> np.ndarray:
    """Arrival times in seconds, float64 [count], of a renewal process of `rate` requests per second.

    Gaps are gamma distributed with coefficient of variation `cv`: 1 is a Poisson process, above 1 is bursty, 0 is a
    clock.
    """
    if count < 1 or rate <= 0 or cv < 0:
        raise TraceError(f"count {count}, rate {rate}, cv {cv}: use count >= 1, rate > 0 and cv >= 0.")
    if cv == 0:
        return np.arange(count) / rate
    shape = 1 / cv**2
    gaps = rng.gamma(shape, 1 / (rate * shape), count)
    return np.cumsum(gaps) - gaps[0]


@dataclasses.dataclass(frozen=True)
class LoadPhase:
    """A load for some time: `rate` requests per second (a Poisson process) for `seconds`."""

    seconds: float
    rate: float
    inputs: Lengths
    outputs: Lengths

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.rate > 0):
            raise TraceError(f"A phase of {self.seconds} s at {self.rate} requests per second; both must be above 0.")

    def lasting(self, seconds: float) -> "LoadPhase":
        """Returns the same load for another time."""
        return dataclasses.replace(self, seconds=seconds)


def phased(phases: Sequence[LoadPhase], *, seed: int) -> Trace:
    """Makes loads that follow one another, with prompts that share nothing. Raises TraceError if no request arrives."""
    rng = np.random.default_rng(seed)
    start_s, requests = 0.0, []
    for phase in phases:
        count = int(rng.poisson(phase.seconds * phase.rate))
        times = np.sort(rng.uniform(start_s, start_s + phase.seconds, count))
        for arrival_s, tokens, output in zip(
            times, phase.inputs.draw(count, rng), phase.outputs.draw(count, rng), strict=True
        ):
            requests.append(
                TraceRequest(
                    id=str(len(requests)),
                    arrival_s=float(arrival_s),
                    input_tokens=int(tokens),
                    output_tokens=int(output),
                )
            )
        start_s += phase.seconds
    if not requests:
        raise TraceError(f"{len(phases)} phases of {start_s} s in all bring no request; make them longer.")
    return Trace("phased", tuple(requests))


def prefix_tree(
    arrivals_s: np.ndarray,
    inputs: Lengths,
    outputs: Lengths,
    hit_rate: float,
    *,
    seed: int,
    block_size: int = 512,
    branching: float = 0.5,
) -> Trace:
    """Makes prompts that share prefixes so that an unlimited cache hits `hit_rate` of all prompt blocks.

    Each prompt continues an earlier one for as many of its blocks as the rate still owes, and then goes its own way,
    which later prompts may continue. Rates near 1 are reached only as far as earlier prompts are long enough.

    Args:
        arrivals_s: of the requests, in seconds, from `arrivals`.
        inputs: prompt tokens.
        outputs: output tokens.
        hit_rate: hit blocks over all blocks, 0 to below 1.
        seed: of everything random.
        block_size: tokens per block.
        branching: how strongly recent prompts are preferred as parents, above 0; small values prefer the latest.
    """
    if not 0 <= hit_rate < 1 or branching <= 0:
        raise TraceError(f"`hit_rate` {hit_rate}, `branching` {branching}: use 0 <= hit_rate < 1 and branching > 0.")
    rng = np.random.default_rng(seed)
    count = len(arrivals_s)
    prompt_tokens, output_tokens = inputs.draw(count, rng), outputs.draw(count, rng)
    fresh = itertools.count()
    paths: list[tuple[int, ...]] = []
    requests = []
    owed = 0.0
    for index in range(count):
        blocks, full = -(-int(prompt_tokens[index]) // block_size), int(prompt_tokens[index]) // block_size
        owed += hit_rate * blocks
        shared: tuple[int, ...] = ()
        if paths:
            # Gamma-distributed age: parents are mostly recent, as turns of one conversation are.
            candidates = [paths[-1 - int(age) % len(paths)] for age in rng.gamma(1, branching * 100, 16)]
            parent = max(candidates, key=len)
            shared = parent[: min(int(owed), full)]
        owed -= len(shared)
        path = (*shared, *itertools.islice(fresh, blocks - len(shared)))
        paths.append(path[:full])
        requests.append(
            TraceRequest(
                id=str(index),
                arrival_s=float(arrivals_s[index]),
                input_tokens=int(prompt_tokens[index]),
                output_tokens=int(output_tokens[index]),
                keys=path,
            )
        )
    return Trace("prefix_tree", tuple(requests), block_size)


def chat(
    sessions: int,
    *,
    session_rate: float,
    turns: float,
    think_s: float,
    system: Lengths,
    question: Lengths,
    answer: Lengths,
    seed: int,
    system_prompts: int = 4,
    block_size: int = 512,
) -> Trace:
    """Makes conversations: every turn repeats the whole history, so later turns hit the KV of earlier ones.

    Args:
        sessions: how many conversations.
        session_rate: conversations that start per second (a Poisson process).
        turns: mean turns per conversation (geometric, at least 1).
        think_s: mean seconds between turns (exponential).
        system: tokens of a system prompt; `system_prompts` different ones are shared by all conversations.
        question: new tokens of the user's turn.
        answer: output tokens.
        seed: of everything random.
        system_prompts: number of different system prompts.
        block_size: tokens per block.
    """
    if sessions < 1 or turns < 1 or think_s <= 0 or system_prompts < 1:
        raise TraceError(
            f"sessions {sessions}, turns {turns}, think_s {think_s}, system_prompts {system_prompts}: "
            "use at least 1 session, turn and system prompt, and a positive think time."
        )
    rng = np.random.default_rng(seed)
    fresh = itertools.count()
    # Whole blocks, so that all conversations with one system prompt share it entirely.
    systems = [tuple(itertools.islice(fresh, max(1, int(n) // block_size))) for n in system.draw(system_prompts, rng)]
    requests = []
    for start_s in arrivals(sessions, session_rate, rng):
        # Full blocks of the last prompt: its partial last block is filled further by the answer, so it is named anew.
        known = systems[rng.integers(system_prompts)]
        tokens, arrival_s = len(known) * block_size, float(start_s)
        for _ in range(rng.geometric(1 / turns)):
            tokens += int(question.draw(1, rng)[0])
            answered = int(answer.draw(1, rng)[0])
            path = (*known, *itertools.islice(fresh, -(-tokens // block_size) - len(known)))
            requests.append(
                TraceRequest(id="0", arrival_s=arrival_s, input_tokens=tokens, output_tokens=answered, keys=path)
            )
            known = path[: tokens // block_size]
            tokens += answered
            arrival_s += float(rng.exponential(think_s))
    requests.sort(key=lambda request: request.arrival_s)
    return Trace("chat", tuple(dataclasses.replace(r, id=str(i)) for i, r in enumerate(requests)), block_size)


def documents(
    requests: int,
    *,
    rate: float,
    count: int,
    zipf: float,
    document: Lengths,
    question: Lengths,
    answer: Lengths,
    seed: int,
    block_size: int = 512,
) -> Trace:
    """Makes single questions about documents of unequal popularity, each independent of those before it.

    Args:
        requests: how many.
        rate: requests per second (a Poisson process).
        count: of documents; the document of rank r is asked for in proportion to r^-`zipf`.
        document: tokens of a document, cut to whole blocks.
        question: tokens after it.
        answer: output tokens.
        seed: of everything random.
        block_size: tokens per block.
    """
    if requests < 1 or count < 1 or zipf < 0:
        raise TraceError(f"requests {requests}, count {count}, zipf {zipf}: use at least 1, 1 and 0.")
    rng = np.random.default_rng(seed)
    fresh = itertools.count()
    known = [tuple(itertools.islice(fresh, max(1, int(n) // block_size))) for n in document.draw(count, rng)]
    weights = np.arange(1, count + 1) ** -zipf
    asked = rng.choice(count, requests, p=weights / weights.sum()).tolist()
    new, answered = question.draw(requests, rng).tolist(), answer.draw(requests, rng).tolist()
    made = []
    for index, arrival_s in enumerate(arrivals(requests, rate, rng).tolist()):
        blocks = known[asked[index]]
        tokens = len(blocks) * block_size + new[index]
        path = (*blocks, *itertools.islice(fresh, -(-new[index] // block_size)))
        made.append(
            TraceRequest(
                id=str(index), arrival_s=arrival_s, input_tokens=tokens, output_tokens=answered[index], keys=path
            )
        )
    return Trace("documents", tuple(made), block_size)
