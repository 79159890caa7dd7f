"""What the client makes of servers that are not ours, and of those that fail: a socket that says what it is told."""

import asyncio
import contextlib
import json
import re
import socketserver
import threading
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from serving.replay import Replay, ReplayError, ServerClient, replay
from serving.replay.client import completion_body
from serving.replay.scrape import ServerCounters
from serving.request import TraceRequest
from serving.workload.prompts import PromptWriter
from serving.workload.requests import Trace

Said = list[bytes]
METRICS = (
    'vllm:num_preemptions_total{engine="0"} 3\nvllm:num_preemptions_total{engine="1"} 4\nvllm:num_requests_running 2\n'
)


def answer(body: str, status: str = "200 OK") -> Said:
    """A whole HTTP answer."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return [f"{head}Connection: close\r\n\r\n{body}".encode()]


def stream(*events: object, cut: bool = False, end: str = "\n", before: str = "") -> Said:
    """An answer in server-sent events, one chunk of HTTP each; `cut` hangs up before the end.

    Lines end with `end`; every event follows the lines `before`.
    """
    pieces = [
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    ]
    for event in events:
        lines = [*before.splitlines(), f"data: {event if isinstance(event, str) else json.dumps(event)}", "", ""]
        data = end.join(lines).encode()
        pieces.append(b"%x\r\n%s\r\n" % (len(data), data))
    return pieces if cut else [*pieces, b"0\r\n\r\n"]


@contextlib.contextmanager
def serving(script: Callable[[str], Said]) -> Iterator[str]:
    """The URL of a server that answers a path with what `script` says, in pieces 10 ms apart, and hangs up."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            head = "".join(iter(lambda: self.rfile.readline().decode(), "\r\n"))
            length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
            self.rfile.read(int(length[1]) if length else 0)
            for piece in script(head.split()[1]):
                self.wfile.write(piece)
                time.sleep(0.01)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()
        thread.join()


def one(script: Said) -> Replay:
    """Replays one request of three tokens against a server that answers completions with `script`."""

    async def run(url: str) -> Replay:
        async with ServerClient(url) as client:
            trace = Trace("one", (TraceRequest(id="5", arrival_s=0.0, input_tokens=4, output_tokens=3, keys=(0,)),), 4)
            return await replay(client, "m", trace, PromptWriter([1, 2, 3], 4))

    completions = iter([stream(text(0), "[DONE]"), script])  # the first one is a probe
    with serving(lambda path: answer(METRICS) if path == "/metrics" else next(completions)) as url:
        return asyncio.run(run(url))


def text(index: int, tokens: int | None = None) -> dict[str, object]:
    usage = {} if tokens is None else {"usage": {"completion_tokens": tokens}}
    return {"choices": [{"index": 0, "text": f"t{index}"}]} | usage


def last(tokens: int, cached: int | None = None) -> dict[str, object]:
    details = None if cached is None else {"cached_tokens": cached}
    return {"choices": [], "usage": {"completion_tokens": tokens, "prompt_tokens_details": details}}


def test_a_server_with_running_usage() -> None:
    run = one(stream(text(0, 1), text(1, 3), last(3, 2), "[DONE]"))
    (outcome,) = run.outcomes
    assert (outcome.id, outcome.outcome, outcome.output_tokens, outcome.hit_tokens) == ("5", "completed", 3, 2)
    assert run.hits_told
    assert outcome.ttft_s is not None
    assert 0 < outcome.ttft_s < 1
    assert outcome.tbt_s is not None  # two tokens in one piece: gaps of the time since the first, and of nothing
    assert 0.005 < outcome.tbt_s < 1
    assert run.pieces == 2


def test_a_server_that_counts_only_at_the_end_or_never() -> None:
    run = one(stream(text(0), text(1), text(2), last(3), "[DONE]"))
    assert (run.outcomes[0].output_tokens, run.pieces, run.hits_told) == (3, 3, False)
    run = one(stream(text(0), text(1), text(2), "[DONE]"))
    assert (run.outcomes[0].outcome, run.outcomes[0].output_tokens) == ("completed", 3)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("before", ["", ": keep-alive\n", "event: completion\nid: 7\nretry: 10\n", ":\n\n"])
def test_every_form_of_a_stream_is_read(end: str, before: str) -> None:
    run = one(stream(text(0, 1), text(1, 3), last(3), "[DONE]", end=end, before=before))
    assert (run.outcomes[0].outcome, run.outcomes[0].output_tokens, run.pieces) == ("completed", 3, 2)


def test_an_event_of_several_lines_is_one_event() -> None:
    whole = json.dumps(text(0, 3), indent=1).replace("\n", "\ndata: ")
    assert one(stream(whole, "[DONE]")).outcomes[0].output_tokens == 3


@pytest.mark.parametrize(
    ("script", "fate", "tokens", "message"),
    [
        (answer('{"error": {"message": "full"}}', "429 Too Many Requests"), "rejected", 0, "full"),
        (answer("oops", "500 Internal Server Error"), "failed", 0, "oops"),
        (answer('{"detail": "no"}', "400 Bad Request"), "failed", 0, "{'detail': 'no'}"),
        (stream(text(0, 1), {"error": {"message": "died"}}, "[DONE]"), "failed", 1, "died"),
        (stream(text(0, 1), cut=True), "failed", 1, "RemoteProtocolError: peer closed connection"),
        (stream(text(0, 1), text(1, 2), "[DONE]"), "failed", 2, "The answer ended with 2 of 3 tokens"),
        (stream("[DONE]"), "failed", 0, "The answer ended with 0 of 3 tokens"),
        (stream(text(0, 4), "[DONE]"), "failed", 4, "The answer ended with 4 of 3 tokens"),
        (stream("{broken"), "failed", 0, "The stream has an event that is no completion (JSONDecodeError"),
        (stream([5]), "failed", 0, "The stream has an event that is no completion (AttributeError"),
        (stream({"text": 5}), "failed", 0, "The stream has an event that is no completion (KeyError: 'choices')"),
        (answer('{"choices": []}'), "failed", 0, "SSEError: Expected response header Content-Type"),
        ([], "failed", 0, "RemoteProtocolError: Server disconnected"),
    ],
)
def test_what_goes_wrong_is_an_outcome_and_a_reason(script: Said, fate: str, tokens: int, message: str) -> None:
    run = one(script)
    (outcome,) = run.outcomes
    assert (outcome.outcome, outcome.output_tokens) == (fate, tokens)
    ((error, count),) = run.errors.items()
    assert error.startswith(message)
    assert count == 1


def test_a_server_that_refuses_every_request_is_told_before_the_clock_starts() -> None:
    async def run(url: str) -> None:
        async with ServerClient(url) as client:
            trace = Trace("one", (TraceRequest(id="5", arrival_s=1000.0, input_tokens=4, output_tokens=3),), 4)
            await replay(client, "m", trace, PromptWriter([1, 2, 3], 4))

    refusal = answer('{"error": {"message": "no such model"}}', "404 Not Found")
    with (
        serving(lambda path: answer(METRICS) if path == "/metrics" else refusal) as url,
        pytest.raises(ReplayError, match="does not complete a prompt of token ids for 'm': no such model"),
    ):
        asyncio.run(run(url))


def test_metrics_of_any_prefix_are_summed_over_engines() -> None:
    now = ServerCounters.parse(METRICS)
    assert (now.preemptions, now.running, now.waiting, now.compiles) == (7, 2, None, None)
    since = ServerCounters(preemptions=9, running=1).since(now)
    assert (since.preemptions, since.running) == (2, 1)


def ask(url: str, question: Callable[[ServerClient], Awaitable[object]]) -> None:
    async def run() -> None:
        async with ServerClient(url) as client:
            await question(client)

    asyncio.run(run())


def test_servers_that_are_none() -> None:
    with (
        serving(lambda path: answer("<html>")) as url,
        pytest.raises(ReplayError, match=r"/v1/models answered '<html>', which names no model"),
    ):
        ask(url, ServerClient.model)
    with (
        serving(lambda path: answer("", "404 Not Found")) as url,
        pytest.raises(ReplayError, match=r"/tokenize answered 404.*`--tokenizer=DIR`"),
    ):
        ask(url, lambda client: client.encode("m", "x"))
    with pytest.raises(ReplayError, match=r"server at http://127\.0\.0\.1:9 does not answer \(ConnectError"):
        ask("http://127.0.0.1:9", ServerClient.model)


def test_the_body_asks_for_exactly_so_many_tokens() -> None:
    body = json.loads(completion_body("m", [1, 2], 7))
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"], body["prompt"]) == (7, 7, True, [1, 2])
