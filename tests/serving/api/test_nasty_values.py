"""Every field of every body with every nasty value: answered, never with a server error, and the server lives on."""

import json
from collections.abc import Iterator

import httpx
import pydantic
import pytest

from experiments.common.server_process import ServerProcess
from serving.api.schemas import ChatBody, CompletionBody, DetokenizeBody, GenerationBody, TokenizeBody
from tests.serving.api.conftest import SERVER_FLAGS

DIGITS = "7" * 5000  # Python reads numbers of at most 4300
MANY = 100_000
INTEGERS = [0, 1, -1, 2**31 - 1, 2**31, -(2**31) - 1, 2**32, 2**63 - 1, 2**63, -(2**63) - 1, 2**64 - 1, 2**64]
FLOATS = ["1.5", "-0.0", "1e38", "1e39", "-1e39", "1e308", "1e400", "NaN", "Infinity", "-Infinity", f"-0.{DIGITS}"]
TINY = ["1e-30", "1e-39", "1e-46", "5e-324"]  # the second is a float32 below its normal ones, the third is 0
TEXTS = ["", "\ud800", "a\udfff\ud800b", "\0", "\u2028", DIGITS]
LISTS = [[], [None], [[]], [[[[[]]]]], ["\ud800"], [2**63], [7] * MANY, [None] * MANY, ["a"] * MANY]
OBJECTS = [
    {},
    {"": 1},
    {"\ud800": 1},
    {DIGITS: 1},
    {"1": 1e39},
    {"1": float("nan")},
    {str(2**63): 1},
    {str(token): 1 for token in range(MANY)},
    {"self": 1, "messages": 1, "add_generation_prompt": 1},
    {"type": "text", "text": "\ud800"},
]
VALUES = [
    *(DIGITS, f"[{DIGITS}]", "[" * MANY + "]" * MANY, "null", "true"),
    *(*FLOATS, *TINY),
    *(json.dumps(value) for value in (*INTEGERS, *TEXTS, *LISTS, *OBJECTS)),
]
BODIES: list[tuple[str, type[pydantic.BaseModel], dict[str, str]]] = [
    ("/v1/completions", CompletionBody, {"prompt": '"ab"', "max_tokens": "2"}),
    ("/v1/chat/completions", ChatBody, {"messages": '[{"role": "user", "content": "a"}]', "max_tokens": "2"}),
    ("/tokenize", TokenizeBody, {"prompt": '"ab"'}),
    ("/detokenize", DetokenizeBody, {"tokens": "[1]"}),
]
MESSAGES = ['[{"role": %s, "content": "a"}]', '[{"role": "user", "content": %s}]', '[{"role": "user", "name": %s}]']


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tiny_model, tmp_path_factory.mktemp("server") / "log", *SERVER_FLAGS) as process:
        yield process


def bodies(model: type[pydantic.BaseModel], usual: dict[str, str]) -> Iterator[str]:
    """JSON texts: the usual fields, one of them nasty. Fields of both endpoints are sent to the first alone."""
    shared = GenerationBody.model_fields.keys() if model is ChatBody else set()
    for name in [*(model.model_fields.keys() - shared), "some_vendor_hint"]:
        for value in VALUES:
            yield text(usual | {name: value})
    if "messages" in model.model_fields:
        for form in MESSAGES:
            for value in VALUES:
                yield text({"max_tokens": "2", "messages": form % value})


def text(fields: dict[str, str]) -> str:
    return f"{{{', '.join(f'{json.dumps(name)}: {value}' for name, value in fields.items())}}}"


@pytest.mark.parametrize(("path", "model", "usual"), BODIES, ids=[path for path, _, _ in BODIES])
def test_no_value_of_a_field_is_a_server_error(
    server: ServerProcess, path: str, model: type[pydantic.BaseModel], usual: dict[str, str]
) -> None:
    with httpx.Client(base_url=server.url, timeout=60, headers={"Content-Type": "application/json"}) as client:
        plain = {"prompt": "ab", "max_tokens": 4, "temperature": 0}
        before = client.post("/v1/completions", json=plain).json()["choices"]
        for body in bodies(model, usual):
            answer = client.post(path, content=body.encode())
            assert answer.status_code in (200, 400, 404), (body[:200], answer.text[:500])
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert error["type"] == "invalid_request_error"
                assert 0 < len(error["message"]) < 1000, body[:200]
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json=plain).json()["choices"] == before
