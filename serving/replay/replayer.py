"""The replay: an open-loop clock sends every request when it is due, whether or not earlier requests were answered.

TTFT counts from the time when a request was due, so a client that falls behind cannot hide its delay; the delay is
reported as skew.
"""

import asyncio
import collections
import dataclasses
from collections.abc import Callable

from serving.replay.client import Answer, ServerClient, completion_body
from serving.replay.errors import ReplayError
from serving.replay.scrape import ServerCounters
from serving.request import TraceRequest
from serving.workload.outcomes import COMPLETED, FAILED, REJECTED, RequestOutcome, tbt_s
from serving.workload.prompts import PromptWriter
from serving.workload.requests import Trace

_LEAD_S = 0.1  # from now to the clock's zero, so that the first request is not late
_SAMPLE_S = 0.5
_TOO_MANY_REQUESTS = 429


@dataclasses.dataclass(frozen=True)
class Sample:
    """A server's metrics at one time, in seconds since the replay's start."""

    time_s: float
    counters: ServerCounters


@dataclasses.dataclass(kw_only=True)
class Replay:
    """The state of a replay, and its result at the end.

    Attributes:
        trace: the workload.
        sent: requests sent.
        first_tokens: requests whose first token came.
        outcomes: outcomes of the requests that ended, in the order of their ends.
        skews_s: per request, seconds from when it was due to when it was sent.
        samples: the server's metrics, twice a second.
        counters: the server's counters since the start, and its gauges at the end.
        errors: messages of rejected and failed requests, with counts.
        pieces: streamed events that carried tokens.
        hits_told: whether the server reported the cached tokens of any request.
    """

    trace: Trace
    sent: int = 0
    first_tokens: int = 0
    outcomes: list[RequestOutcome] = dataclasses.field(default_factory=list)
    skews_s: list[float] = dataclasses.field(default_factory=list)
    samples: list[Sample] = dataclasses.field(default_factory=list)
    counters: ServerCounters = dataclasses.field(default_factory=ServerCounters)
    errors: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    pieces: int = 0
    hits_told: bool = False


async def replay(
    client: ServerClient,
    model: str,
    trace: Trace,
    prompts: PromptWriter,
    on_change: Callable[[Replay], None] = lambda replay: None,
) -> Replay:
    """Sends every request of `trace` when it is due and returns once all have ended.

    Args:
        client: of the server.
        model: the model's name on the server.
        trace: its lengths fit the model.
        prompts: writes the prompts, all of them before the clock starts.
        on_change: called at every change of the replay; must be quick.

    Raises:
        ReplayError: the server does not take such requests at all, or stopped answering.
    """
    bodies = [completion_body(model, prompts.prompt(request), request.output_tokens) for request in trace.requests]
    await _probe(client, model, prompts)
    run = Replay(trace=trace)
    before = await client.counters()
    try:
        async with asyncio.TaskGroup() as group:
            clock = asyncio.get_running_loop().time
            start_s = clock() + _LEAD_S
            watch = group.create_task(_watch(client, run, start_s, on_change))
            async with asyncio.TaskGroup() as answering:
                for request, body in zip(trace.requests, bodies, strict=True):
                    await asyncio.sleep(start_s + request.arrival_s - clock())
                    answering.create_task(_send(client, run, request, body, start_s, on_change))
            watch.cancel()
    except* ReplayError as errors:
        raise _first(errors) from errors
    run.counters = (await client.counters()).since(before)
    return run


async def _probe(client: ServerClient, model: str, prompts: PromptWriter) -> None:
    """Sends one short completion that is not counted: pays first-request costs, and raises ReplayError if refused."""
    request = TraceRequest(id="-1", arrival_s=0.0, input_tokens=8, output_tokens=4)
    answer = await client.complete(completion_body(model, prompts.prompt(request), request.output_tokens))
    if answer.error or not answer.tokens:
        reason = answer.error or "its stream has no tokens"
        raise ReplayError(f"{client.url} does not complete a prompt of token ids for {model!r}: {reason}")


async def _send(
    client: ServerClient,
    run: Replay,
    request: TraceRequest,
    body: bytes,
    start_s: float,
    on_change: Callable[[Replay], None],
) -> None:
    clock = asyncio.get_running_loop().time
    run.skews_s.append(clock() - start_s - request.arrival_s)
    run.sent += 1
    on_change(run)

    def first_token() -> None:
        run.first_tokens += 1
        on_change(run)

    answer = await client.complete(body, first_token)
    if not answer.error and answer.tokens != request.output_tokens:
        answer.error = f"The answer ended with {answer.tokens} of {request.output_tokens} tokens"
    run.pieces += answer.pieces
    run.hits_told |= answer.cached_tokens is not None
    outcome = _outcome(request, answer, start_s, clock() - start_s)
    run.outcomes.append(outcome)
    if answer.error:
        run.errors[answer.error] += 1
    on_change(run)
    if outcome.outcome == FAILED and answer.status == 0:
        await client.counters()  # raises if it is the server that is gone, and not this connection alone


def _outcome(request: TraceRequest, answer: Answer, start_s: float, ended_s: float) -> RequestOutcome:
    if not answer.error:
        fate = COMPLETED
    elif answer.status == _TOO_MANY_REQUESTS:
        fate = REJECTED
    else:
        fate = FAILED
    return RequestOutcome(
        id=request.id,
        arrival_s=request.arrival_s,
        input_tokens=request.input_tokens,
        output_tokens=answer.tokens,
        ttft_s=None if answer.times.first_s is None else answer.times.first_s - start_s - request.arrival_s,
        tbt_s=tbt_s(answer.times.gaps_s),
        hit_tokens=answer.cached_tokens or 0,
        prefill="",
        decode="",
        outcome=fate,
        finished_s=ended_s,
    )


async def _watch(client: ServerClient, run: Replay, start_s: float, on_change: Callable[[Replay], None]) -> None:
    """Samples the server's metrics until cancelled; raises ReplayError if it stops answering."""
    clock = asyncio.get_running_loop().time
    while True:
        counters = await client.counters()
        run.samples.append(Sample(clock() - start_s, counters))
        on_change(run)
        await asyncio.sleep(_SAMPLE_S)


def _first(errors: BaseExceptionGroup) -> ReplayError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, ReplayError)
    return error
