"""The server as its users meet it: a real process, a real engine, the official client."""

import concurrent.futures
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from experiments.common.server_process import ServerProcess
from tests.serving.api.conftest import SERVER_FLAGS

PROMPT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on."
CHAT: list = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, who are you?"}]


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tiny_model, tmp_path_factory.mktemp("server") / "log", *SERVER_FLAGS) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def metrics(server: ServerProcess) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics").text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {sample.name: sample.value for sample in samples if not sample.name.endswith("_bucket")}


def until_idle(server: ServerProcess) -> dict[str, float]:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        values = metrics(server)
        if values["halfmoon:num_requests_running"] + values["halfmoon:num_requests_waiting"] == 0:
            return values
        time.sleep(0.02)
    raise AssertionError("the server still works on something")


def complete(client: openai.OpenAI, prompt=PROMPT, **fields):
    fields = {"max_tokens": 24, "temperature": 0} | fields
    return client.completions.create(model="tiny", prompt=prompt, **fields)


def test_models(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.object) == ("tiny", "model")
    assert card.model_extra == {"max_model_len": 1024, "vocab_size": 260}
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("gpt-5")


def test_completion(client: openai.OpenAI) -> None:
    answer = complete(client)
    assert answer.object == "text_completion"
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 24)
    assert answer.usage.total_tokens == len(PROMPT) + 24


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    *texts, last = chunks
    whole = complete(client)
    assert "".join(chunk.choices[0].text for chunk in texts) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in texts][-1] == "length"
    assert last.choices == []
    assert last.usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in texts)
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_may_run_along_a_stream(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk.usage.completion_tokens for chunk in complete(client, stream=True, stream_options=options)]
    assert counts == sorted(counts)
    assert counts[-1] == 24


def test_token_ids_are_prompts_too(client: openai.OpenAI, server: ServerProcess) -> None:
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": PROMPT}).json()
    assert (tokens["count"], tokens["max_model_len"]) == (len(PROMPT), 1024)
    assert complete(client, tokens["tokens"]).choices[0].text == complete(client).choices[0].text
    text = httpx.post(f"{server.url}/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"]
    assert text == PROMPT


def test_prompts_of_a_list_are_answered_in_its_order(client: openai.OpenAI) -> None:
    prompts = [PROMPT, PROMPT.upper(), PROMPT[::-1]]
    together = complete(client, prompts, n=2, temperature=1, seed=5).choices
    assert [choice.index for choice in together] == list(range(6))
    alone = [complete(client, prompt, n=2, temperature=1, seed=5).choices for prompt in prompts]
    assert [choice.text for choice in together] == [choice.text for choices in alone for choice in choices]


def test_seeds_repeat_and_choices_differ(client: openai.OpenAI) -> None:
    first, again = (complete(client, n=3, temperature=1, seed=7).choices for _ in range(2))
    assert [choice.text for choice in first] == [choice.text for choice in again]
    assert len({choice.text for choice in first}) == 3
    assert complete(client, temperature=1, seed=8).choices[0].text == first[1].text
    last = complete(client, n=2, temperature=1, seed=2**64 - 1).choices
    assert complete(client, temperature=1, seed=0).choices[0].text == last[1].text
    unseeded = {complete(client, temperature=1).choices[0].text for _ in range(3)}
    assert len(unseeded) == 3


def test_prefixes_are_reused_unless_salted(client: openai.OpenAI) -> None:
    prompt = "a prefix that nobody else has sent: " * 4

    def cached_tokens(**fields) -> int:
        details = complete(client, prompt, max_tokens=1, extra_body=fields).usage.prompt_tokens_details
        return details.cached_tokens

    assert cached_tokens() == 0
    # Whole pages, but never the last token: its logits are needed.
    assert cached_tokens() == (len(prompt) - 1) // 16 * 16
    assert cached_tokens(cache_salt="another tenant") == 0


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    answer = complete(client, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 24
    assert sorted(logprobs.text_offset) == logprobs.text_offset
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert token.startswith("bytes:") or answer.choices[0].text[offset:].startswith(token)
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == logprob
        assert logprob == max(top.values())
        assert logprob < 0
    assert complete(client).choices[0].logprobs is None
    streamed = [chunk.choices[0].logprobs for chunk in complete(client, logprobs=3, stream=True)]
    assert [token for part in streamed for token in part.tokens] == logprobs.tokens
    assert [offset for part in streamed for offset in part.text_offset] == logprobs.text_offset


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI) -> None:
    text = complete(client).choices[0].text
    stop = text[10:12]
    choice = complete(client, stop=["not in the text", stop]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == text[: text.index(stop)]
    assert choice.stop_reason == stop
    streamed = "".join(chunk.choices[0].text for chunk in complete(client, stop=stop, stream=True))
    assert streamed == choice.text


def test_stop_tokens_biases_and_minimum_lengths(client: openai.OpenAI) -> None:
    a, b = ord("a") - ord("!"), ord("b") - ord("!")
    answer = complete(client, "x", logit_bias={a: 100}, max_tokens=5)
    assert answer.choices[0].text == "aaaaa"
    fields = {"stop_token_ids": [a], "min_tokens": 3}
    answer = complete(client, "x", logit_bias={a: 100, b: 90}, max_tokens=9, extra_body=fields)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("bbb", "stop")
    assert answer.choices[0].stop_reason == a
    assert answer.usage.completion_tokens == 4


def test_the_end_of_sequence_token_ends_unless_ignored(client: openai.OpenAI) -> None:
    end = 256
    answer = complete(client, "x", logit_bias={end: 100})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    answer = complete(client, "x", logit_bias={end: 100}, max_tokens=5, extra_body={"ignore_eos": True})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 5)


def test_echo(client: openai.OpenAI) -> None:
    plain = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == PROMPT + plain
    assert "".join(chunk.choices[0].text for chunk in complete(client, echo=True, stream=True)) == PROMPT + plain


def chat(client: openai.OpenAI, **fields):
    fields = {"max_completion_tokens": 24, "temperature": 0} | fields
    return client.chat.completions.create(model="tiny", messages=CHAT, **fields)


def test_chat(client: openai.OpenAI) -> None:
    answer = chat(client)
    message = answer.choices[0].message
    assert (answer.object, message.role, answer.choices[0].finish_reason) == ("chat.completion", "assistant", "length")
    rendered = "<|system|>Be brief.<|end|><|user|>Hello, who are you?<|end|><|assistant|>"
    assert complete(client, rendered).choices[0].text == message.content
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
    same = client.chat.completions.create(model="tiny", messages=parts, max_tokens=24, temperature=0)
    assert same.choices[0].message.content == message.content


def test_chat_streams(client: openai.OpenAI) -> None:
    chunks = list(chat(client, stream=True, n=2, stream_options={"include_usage": True}))
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    texts = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert texts[0] == texts[1] == chat(client).choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 48


def test_a_chat_without_a_limit_fills_the_context(client: openai.OpenAI) -> None:
    answer = chat(client, max_completion_tokens=None, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 1024


def test_a_completion_without_a_limit_generates_what_fits(client: openai.OpenAI) -> None:
    for prompt_tokens, generated in ((1, 16), (1008, 16), (1009, 15), (1023, 1)):
        answer = complete(client, "a" * prompt_tokens, max_tokens=None, extra_body={"ignore_eos": True})
        assert answer.usage.completion_tokens == generated


def test_logprobs_of_chats(client: openai.OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=2).choices[0]
    content = choice.logprobs.content
    assert len(content) == 24
    assert b"".join(bytes(token.bytes) for token in content).decode(errors="replace") == choice.message.content
    for token in content:
        assert token.token.startswith("bytes:") or bytes(token.bytes).decode() == token.token
        assert token.top_logprobs[0].logprob == token.logprob
        assert len(token.top_logprobs) == 2
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({}, 400, "prompt", "Field required"),
        ({"prompt": 5}, 400, "prompt", "a string, a list of strings, token ids, or a list of lists of token ids"),
        ({"prompt": ["a", 3]}, 400, "prompt", "`prompt.1`: Input should be a valid string, not 3"),
        ({"prompt": []}, 400, "prompt", "empty list"),
        ({"prompt": ""}, 400, "prompt", "Prompt 0 has no tokens"),
        ({"prompt": [[]]}, 400, "prompt", "Prompt 0 has no tokens"),
        ({"prompt": [7, 260]}, 400, "prompt", "token id 260; this model's ids are 0 to 259"),
        ({"prompt": [-1]}, 400, "prompt", "token id -1"),
        (b'{"prompt": "\\ud800"}', 400, "prompt", "surrogate"),
        ({"prompt": "a" * 1024}, 400, "prompt", "1025 were asked for: 1024 in `prompt` and 1 to generate"),
        ({"prompt": "a", "max_tokens": 1024}, 400, "prompt", "maximum context length is 1024 tokens"),
        ({"prompt": "a", "model": "gpt-5"}, 404, "model", "The model 'gpt-5' does not exist here"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1, not 0"),
        ({"prompt": "a", "max_tokens": "16"}, 400, "max_tokens", "valid integer, not '16'"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"prompt": "a", "temperature": True}, 400, "temperature", "valid number, not True"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p", "a probability from 1e-30 to 1"),
        ({"prompt": "a", "top_k": -2}, 400, "top_k", "`top_k` is -2"),
        ({"prompt": "a", "top_k": 2**31}, 400, "top_k", "use a number of tokens up to 2147483647, or 0 for all"),
        ({"prompt": "a", "repetition_penalty": 1e-30}, 400, "repetition_penalty", "a number from 0.001 to 1000"),
        ({"prompt": "a", "priority": 2**63}, 400, "priority", "less than 9223372036854775808"),
        (b'{"prompt": "a", "cache_salt": "\\ud800"}', 400, "cache_salt", "lone surrogate at character 0"),
        (b'{"prompt": "a", "user": "a\\udfff"}', 400, "user", "lone surrogate at character 1"),
        ({"prompt": "a", "stop": ["b" * 1025]}, 400, "stop", "at most 1024 characters"),
        ({"prompt": "a", "stop_token_ids": [1] * 25}, 400, "stop_token_ids", "at most 24 items"),
        ({"prompt": "a", "n": 0}, 400, "n", "greater than or equal to 1"),
        ({"prompt": "a", "n": 65}, 400, None, "65 choices were asked for at once"),
        ({"prompt": "a", "best_of": 3}, 400, "best_of", "only the value of `n`, 1, is supported"),
        ({"prompt": "a", "logprobs": 21}, 400, "logprobs", "from 0 to 20"),
        ({"prompt": "a", "logprobs": 1, "echo": True}, 400, "echo", "no log-probabilities"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "keys are token ids"),
        ({"prompt": "a", "logit_bias": {"7" * 5000: 1}}, 400, "logit_bias", "at most 1024 characters"),
        ({"prompt": "a", "logit_bias": {"7" * 99: 1}}, 400, "logit_bias", "keys are token ids"),
        ({"prompt": "a", "logit_bias": {str(i): 1 for i in range(301)}}, 400, "logit_bias", "at most 300 token ids"),
        ({"prompt": "a", "logit_bias": {"260": 1}}, 400, "logit_bias", "vocabulary ends at token id 259"),
        ({"prompt": "a", "stop": ""}, 400, "stop", "at least one character"),
        ({"prompt": "a", "stop": 5}, 400, "stop", "a string or a list"),
        ({"prompt": "a", "min_tokens": 17}, 400, "min_tokens", "at most `max_tokens`, which is 16"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options", "needs `stream`"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix", "`suffix` is not supported"),
        ({"prompt": "a", "response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
        ([], 400, None, "valid dictionary"),
        (b'{"prompt": "a"', 400, None, "The body is not JSON"),
        (b"\xff\xfe", 400, None, ""),
    ],
)
def test_wrong_input_is_answered_with_what_is_wrong(
    server: ServerProcess, body: object, status: int, param: str | None, message: str
) -> None:
    headers = {"Content-Type": "application/json"}
    if isinstance(body, bytes):
        answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    else:
        answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "at least 1 item"),
        ({"messages": [{"content": "who says this?"}]}, "`messages.0.role`: Field required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "`messages.0.content.0.type`"),
        ({"top_logprobs": 2}, "`top_logprobs` needs `logprobs`"),
        ({"tools": [{"type": "function"}]}, "`tools` is not supported"),
        ({"max_tokens": 5000}, "5000 to generate"),
    ],
)
def test_wrong_chats_too(server: ServerProcess, fields: dict, message: str) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": CHAT} | fields)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]


def test_harmless_unknown_fields_are_ignored(client: openai.OpenAI) -> None:
    fields = {"some_vendor_hint": {"a": 1}, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "tools": None}
    assert complete(client, user="me", extra_body=fields).choices[0].text == complete(client).choices[0].text


def test_a_body_that_is_not_called_json_is_told_so(server: ServerProcess) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", data={"prompt": "a"})
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_wrong_routes(server: ServerProcess) -> None:
    assert httpx.get(f"{server.url}/v2/models").json()["error"]["message"].startswith("There is no GET /v2/models")
    answer = httpx.get(f"{server.url}/v1/completions")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"


def test_many_clients_get_what_each_gets_alone(client: openai.OpenAI, server: ServerProcess) -> None:
    # Greedy: batch mates may change the rounding of logits, and a draw at a boundary is then another token.
    prompts = [PROMPT[start:] + PROMPT[:start] for start in range(0, 48, 3)]
    alone = [complete(client, prompt, temperature=0.0).choices[0].text for prompt in prompts]

    def streamed(prompt: str) -> str:
        return "".join(chunk.choices[0].text for chunk in complete(client, prompt, temperature=0.0, stream=True))

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(streamed, prompts))
    assert together == alone
    assert until_idle(server)["halfmoon:kv_cache_usage_perc"] == 0


def test_many_clients_draw_from_the_distributions_that_each_has_alone(client: openai.OpenAI) -> None:
    prompts = [PROMPT[start:] + PROMPT[:start] for start in range(0, 48, 3)]

    def drawn(number: int):
        return complete(client, prompts[number], temperature=1, seed=number, logprobs=5).choices[0].logprobs

    alone = [drawn(number) for number in range(len(prompts))]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(drawn, range(len(prompts))))
    parted = 0
    for one, other in zip(alone, together, strict=True):
        for place, token in enumerate(one.tokens):
            # Tens of float32 roundings of logits of order 1; batch mates may change in which order products are summed.
            top, other_top = one.top_logprobs[place], other.top_logprobs[place]
            both = top.keys() & other_top.keys()
            assert len(both) >= len(top) - 1  # the last two may be as good as equal
            assert [other_top[name] for name in both] == pytest.approx([top[name] for name in both], rel=0, abs=1e-5)
            if other.tokens[place] != token:
                parted += 1
                break
            assert other.token_logprobs[place] == pytest.approx(one.token_logprobs[place], rel=0, abs=1e-5)
    # Rounding moves the borders between tokens by 1e-6 at most: of 384 draws hardly one lies there, and never three.
    assert parted <= 2


def test_a_stream_that_nobody_reads_frees_its_pages(client: openai.OpenAI, server: ServerProcess) -> None:
    before = until_idle(server)
    with complete(client, stream=True, max_tokens=900, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        assert metrics(server)["halfmoon:kv_cache_usage_perc"] > 0
    after = until_idle(server)
    assert after["halfmoon:kv_cache_usage_perc"] == 0
    assert after["halfmoon:generation_tokens_total"] - before["halfmoon:generation_tokens_total"] < 800


def test_an_answer_that_nobody_awaits_frees_its_pages(server: ServerProcess) -> None:
    before = until_idle(server)
    body = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=httpx.Timeout(10, read=0.1))
    after = until_idle(server)
    assert after["halfmoon:kv_cache_usage_perc"] == 0
    assert after["halfmoon:generation_tokens_total"] - before["halfmoon:generation_tokens_total"] < 800


def test_metrics_carry_vllms_names(client: openai.OpenAI, server: ServerProcess) -> None:
    before = until_idle(server)
    complete(client, max_tokens=9)
    after = until_idle(server)

    def grown(name: str) -> float:
        return after[f"halfmoon:{name}"] - before[f"halfmoon:{name}"]

    assert grown("generation_tokens_total") == 9
    assert grown("prompt_tokens_total") == len(PROMPT)
    assert grown("time_to_first_token_seconds_count") == 1
    assert grown("inter_token_latency_seconds_count") == 8
    assert grown("request_tbt_seconds_count") == 1
    assert grown("e2e_request_latency_seconds_count") == 1
    assert grown("prefix_cache_hits_total") <= grown("prefix_cache_queries_total")
    assert after["halfmoon:num_preemptions_total"] == 0


def test_nothing_was_compiled_while_serving(client: openai.OpenAI, server: ServerProcess) -> None:
    complete(client, n=4, temperature=1, logprobs=2, presence_penalty=1)
    assert until_idle(server)["halfmoon:compiles_after_warm_up_total"] == 0
