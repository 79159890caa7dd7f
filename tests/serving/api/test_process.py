"""Start and end of the server's process."""

import pathlib
import socket
import subprocess
import sys

import httpx
import openai
import pytest

from experiments.common.server_process import ServerDiedError, ServerProcess
from tests.serving.api.clients import events
from tests.serving.api.conftest import SERVER_FLAGS


def test_sigterm_lets_open_requests_finish(tiny_model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with (
        ServerProcess(tiny_model, tmp_path / "log", *SERVER_FLAGS) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.completions.create(
            model="tiny", prompt="x", max_tokens=600, stream=True, extra_body={"ignore_eos": True, "logprobs": 0}
        )
        chunks = iter(stream)
        tokens = len(next(chunks).choices[0].logprobs.tokens)
        server.terminate()
        tokens += sum(len(chunk.choices[0].logprobs.tokens) for chunk in chunks)
        assert tokens == 600
        assert server.exit_code(timeout_s=300) == 0
        assert server.output.rstrip().endswith("Stopped.")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def test_a_failed_engine_ends_its_streams_and_the_process(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "tests.serving.api.broken_server", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().strip()
        body = {"prompt": "abc", "max_tokens": 1000, "stream": True}
        answer = httpx.post(f"{url}/v1/completions", json=body)
        first, *_, last = events(answer)
        assert first["choices"][0]["text"].startswith("a")
        assert last["error"]["message"] == "The engine failed and must be restarted: RuntimeError: the device is gone"
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" in errors
    assert "RuntimeError: the device is gone" in errors
    assert errors.rstrip().endswith("The engine failed and must be restarted: RuntimeError: the device is gone")


def test_a_taken_port_is_told_before_anything_is_loaded(tmp_path: pathlib.Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ServerDiedError, match=f"Cannot serve on 127.0.0.1:{port}.*Address already in use"),
            ServerProcess(tmp_path, tmp_path / "log", f"--port={port}"),
        ):
            pass


def test_a_model_that_is_not_there_is_told_with_what_there_is(tmp_path: pathlib.Path) -> None:
    with (
        pytest.raises(ServerDiedError, match="neither a folder nor a preset"),
        ServerProcess(tmp_path / "nothing", tmp_path / "log"),
    ):
        pass
