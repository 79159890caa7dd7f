"""Large bodies: refused before they are read or tokenised, and nobody else waits for them."""

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from fastapi.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from experiments.common.server_process import ServerProcess
from model.tokenizer import Tokenizer
from serving.api.body_limit import MAX_BODY_BYTES, BodyLimit
from tests.serving.api.clients import client_of
from tests.serving.api.conftest import SERVER_FLAGS
from tests.serving.api.fakes import FakeBackend

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tiny_model, tmp_path_factory.mktemp("server") / "log", *SERVER_FLAGS) as process:
        yield process


def post(server: ServerProcess, path: str, content: bytes | Iterator[bytes]) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{server.url}{path}", content=content, headers=headers, timeout=120)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_above_the_limit_is_a_413(server: ServerProcess, chunked: bool) -> None:
    body = b'{"prompt": "' + b"a" * MAX_BODY_BYTES + b'"}'
    pieces = (body[start : start + MEGABYTE] for start in range(0, len(body), MEGABYTE))
    answer = post(server, "/v1/completions", pieces if chunked else body)
    assert answer.status_code == 413
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert f"larger than {MAX_BODY_BYTES} bytes" in error["message"]


def test_a_prompt_that_cannot_fit_is_refused_by_its_bytes(server: ServerProcess) -> None:
    longest = len("<|assistant|>")
    answer = post(server, "/v1/completions", b'{"prompt": "%s"}' % (b"a" * (1024 * longest + 1)))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "the 13313 bytes in `prompt` are 1025 tokens or more" in error["message"]
    # One byte less may fit, so that it is tokenised, and counted.
    answer = post(server, "/v1/completions", b'{"prompt": "%s"}' % (b"a" * 1024 * longest))
    assert "13313 were asked for: 13312 in `prompt` and 1 to generate" in answer.json()["error"]["message"]
    chat = b'{"messages": [{"role": "user", "content": "%s"}]}' % (b"a" * 5 * MEGABYTE)
    error = post(server, "/v1/chat/completions", chat).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


def test_a_stream_goes_on_while_megabytes_arrive(server: ServerProcess) -> None:
    body = {"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    arrivals: list[float] = []

    def read() -> None:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as answer:
            arrivals.extend(time.monotonic() for line in answer.iter_lines() if line)

    for path, text in (
        ("/v1/completions", b'{"prompt": "%s"}' % (b"hello, " * (5 * MEGABYTE // 7))),
        ("/v1/completions", b'{"prompt": ["a", %s1]}' % (b"1," * MEGABYTE)),
        (
            "/v1/completions",
            b'{"prompt": "a", "logit_bias": {%s}}' % b",".join(b'"%d":0' % i for i in range(300_000)),
        ),
        ("/tokenize", b'{"prompt": "%s"}' % (b"hello, " * (MEGABYTE // 7))),
    ):
        arrivals.clear()
        reader = threading.Thread(target=read)
        reader.start()
        while len(arrivals) < 20:
            time.sleep(0.01)
        sent = time.monotonic()
        status = post(server, path, text).status_code
        answered = time.monotonic()
        reader.join()
        assert status == (200 if path == "/tokenize" else 400)
        during = [now for now in arrivals if sent - 0.2 < now < answered + 0.2]
        # 4.7 s where the interpreter's lock is held throughout; up to 1.5 s where eight others share the two cores.
        assert max(b - a for a, b in itertools.pairwise(during)) < 3


def test_a_body_that_stops_is_a_408(tokenizer: Tokenizer) -> None:
    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await receive()

    async def scenario() -> None:
        pieces: asyncio.Queue[Message] = asyncio.Queue()
        pieces.put_nowait({"type": "http.request", "body": b'{"prompt": ', "more_body": True})
        await BodyLimit(route, silence_s=0.05)({"type": "http", "headers": []}, pieces.get, pieces.put)

    with pytest.raises(HTTPException, match=r"No piece of the body came for 0\.05 s") as error:
        asyncio.run(scenario())
    assert error.value.status_code == 408


def test_a_list_of_prompts_is_counted_before_it_is_tokenised(tokenizer: Tokenizer, monkeypatch) -> None:
    def encode(text: str, **options: object) -> list[int]:
        raise AssertionError("tokenised")

    monkeypatch.setattr(tokenizer, "encode", encode)

    async def scenario() -> httpx.Response:
        async with client_of(FakeBackend(), tokenizer) as client:
            return await client.post("/v1/completions", json={"prompt": ["a"] * 100_000})

    answer = asyncio.run(scenario())
    assert answer.status_code == 400
    assert "100000 choices were asked for at once, and the server lets in 8" in answer.json()["error"]["message"]
