"""Fields that are refused or ignored, and what of a message reaches the chat template."""

import pytest

from serving.api.errors import ApiError
from serving.api.schemas import CompletionBody, Message


def for_template(**fields: object) -> dict[str, object]:
    return Message.model_validate({"role": "assistant"} | fields).for_template()


@pytest.mark.parametrize(
    ("field", "asks", "default"),
    [
        ("continue_final_message", True, False),
        ("skip_special_tokens", False, True),
        ("chat_template", "{{ messages }}", None),
        ("json_schema", "{}", None),
        ("regex", "a+", None),
        ("min_new_tokens", 5, 0),
        ("guided_regex", "a+", None),
        ("response_format", {"type": "json_object"}, {"type": "text"}),
    ],
)
def test_a_field_that_would_change_the_answer_is_refused_by_name(field: str, asks: object, default: object) -> None:
    CompletionBody.model_validate({"prompt": "a", field: default}).refuse_unsupported()
    with pytest.raises(ApiError, match=f"`{field}` is not supported by this server; leave it out"):
        CompletionBody.model_validate({"prompt": "a", field: asks}).refuse_unsupported()


def test_an_unknown_field_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    for value in (1, 2, 3):
        CompletionBody.model_validate({"prompt": "a", "a_vendors_own_hint": value}).refuse_unsupported()
    assert caplog.text.count("a_vendors_own_hint") == 1


def test_parts_of_a_message_are_lines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert for_template(content=parts)["content"] == "one\ntwo"
    assert for_template(content=parts[:1])["content"] == "one"
    assert for_template(content=None)["content"] == ""


def test_arguments_of_tool_calls_are_objects() -> None:
    function = {"name": "find", "arguments": '{"city": "Bern", "days": [1, 2]}'}
    call = {"id": "7", "type": "function", "function": function}
    (seen,) = for_template(tool_calls=[call])["tool_calls"]
    assert seen == call | {"function": {"name": "find", "arguments": {"city": "Bern", "days": [1, 2]}}}
    assert function["arguments"].startswith("{")
    (empty,) = for_template(tool_calls=[{"function": {"name": "now", "arguments": ""}}])["tool_calls"]
    assert empty["function"]["arguments"] == {}
    parsed = [{"function": {"name": "now", "arguments": {"a": 1}}}]
    assert for_template(tool_calls=parsed)["tool_calls"] == parsed
    assert for_template(tool_calls=None)["tool_calls"] is None


def test_arguments_that_are_no_json_are_refused() -> None:
    with pytest.raises(ApiError, match="a tool call of 'find' whose `arguments` are no JSON: Expecting value"):
        for_template(tool_calls=[{"function": {"name": "find", "arguments": "Bern"}}])
