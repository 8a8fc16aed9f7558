from __future__ import annotations

import json
from typing import Any

import pytest

from trtllm_workers.errors import NotSupported, RequestError
from trtllm_workers.ingress.openai import MAX_CHOICES, Ask, parse_chat, parse_completion
from trtllm_workers.ingress.schema import ChatBody, CompletionBody

MESSAGES = [{"role": "user", "content": "Hi"}]


def chat(**fields: Any) -> Ask:
    return parse_chat(json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode())


def complete(**fields: Any) -> Ask:
    return parse_completion(json.dumps({"model": "m", "prompt": "Hi", **fields}).encode())


def refused(error: type[RequestError], **fields: Any) -> RequestError:
    with pytest.raises(error) as caught:
        chat(**fields)
    return caught.value


def test_a_plain_request_needs_no_capability() -> None:
    ask = chat()
    assert ask.fields == {}
    assert (ask.n, ask.stream, ask.max_tokens, ask.logprobs) == (1, False, None, None)
    sampling = ask.sampling(7, 0)
    assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (7, 1.0, None)


def test_every_sampling_field_reaches_the_sampling_parameters() -> None:
    values = {
        "temperature": 0,
        "top_p": 0,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.1,
        "min_tokens": 3,
        "ignore_eos": True,
        "seed": -5,
    }
    ask = chat(**values, stop_token_ids=[1, 2], logit_bias={"7": -100}, logprobs=True)
    sampling = ask.sampling(9, 0)
    assert {name: getattr(sampling, name) for name in values} == values
    assert sampling.stop_token_ids == (1, 2)
    assert sampling.logit_bias == ((7, -100.0),)
    assert sampling.logprobs == 0
    assert set(ask.fields) == {*values, "stop_token_ids", "logit_bias", "logprobs"}


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1},
        {"top_p": 1.0},
        {"top_k": -1},
        {"top_k": 0},
        {"min_p": 0},
        {"presence_penalty": 0},
        {"repetition_penalty": 1},
        {"min_tokens": 0},
        {"ignore_eos": False},
        {"stop_token_ids": []},
        {"logit_bias": {}},
        {"stop": None},
        {"stop": []},
        {"logprobs": False},
    ],
)
def test_defaults_written_out_need_no_capability(fields: dict[str, Any]) -> None:
    assert chat(**fields).fields == {}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.1, "temperature must be between 0 and 2, not -0.1"),
        ("temperature", 2.5, "temperature must be between 0 and 2, not 2.5"),
        ("top_p", 1.1, "top_p must be between 0 and 1"),
        ("top_p", -1, "top_p must be between 0 and 1"),
        ("min_p", 2, "min_p must be between 0 and 1"),
        ("presence_penalty", 2.1, "presence_penalty must be between -2 and 2"),
        ("frequency_penalty", -3, "frequency_penalty must be between -2 and 2"),
        ("repetition_penalty", 0, "repetition_penalty must be above 0"),
        ("top_k", -2, "top_k must be between -1 and 2147483647"),
        ("max_tokens", 0, "max_tokens must be between 1 and"),
        ("max_tokens", -5, "max_tokens must be between 1 and"),
        ("max_completion_tokens", 0, "max_completion_tokens must be between 1 and"),
        ("n", 0, "n must be between 1 and 128"),
        ("n", 129, "n must be between 1 and 128"),
        ("min_tokens", -1, "min_tokens must be between 0 and"),
        ("seed", 1 << 63, "seed must be between"),
        ("stop", [""], "stop holds an empty string"),
        ("stop", "", "stop holds an empty string"),
        ("stop", ["x"] * 17, "stop has 17 strings; at most 16"),
        ("stop", ["x" * 2000], "more than 1024 characters"),
        ("logit_bias", {"a": 1}, "the key 'a' is no token id"),
        ("logit_bias", {"-1": 1}, "the key '-1' is no token id"),
        ("model", "", "model is empty"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any, message: str) -> None:
    error = refused(RequestError, **{field: value})
    assert message in str(error)
    assert error.param == field
    assert error.http_status == 400


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("temperature", "hot", "temperature"),
        ("n", 1.5, "n"),
        ("n", True, "n"),
        ("stream", "yes", "stream"),
        ("stop", 5, "stop"),
        ("messages", "Hi", "messages"),
        ("messages", [{"role": "user", "content": 7}], "messages[0].content"),
        ("messages", [{"role": "user", "content": "a"}, "b"], "messages[1]"),
        ("messages", [{"role": "user", "content": [{"type": 1}]}], "messages[0].content[0].type"),
        ("logit_bias", {"1": "x"}, "logit_bias[...]"),
        ("stream_options", 1, "stream_options"),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_path(
    field: str, value: Any, param: str
) -> None:
    error = refused(RequestError, **{field: value})
    assert error.param == param
    assert "expected" in str(error)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(RequestError, match="required field 'messages' is missing") as error:
        parse_chat(b'{"model": "m"}')
    assert error.value.param == "messages"
    with pytest.raises(RequestError, match=r"required field 'messages\[0\]\.role' is missing"):
        parse_chat(b'{"model": "m", "messages": [{"content": "Hi"}]}')


def test_an_unknown_field_is_named_with_its_nearest() -> None:
    error = refused(RequestError, temprature=1)
    assert str(error) == "unknown field 'temprature'; did you mean 'temperature'?"
    assert error.param == "temprature"
    assert str(refused(RequestError, zzzzz=1)) == "unknown field 'zzzzz'"
    nested = refused(RequestError, messages=[{"role": "user", "content": "a", "x": 1}])
    assert nested.param == "messages[0].x"


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b"", "the request body is empty", None),
        (b"  ", "the request body is empty", None),
        (b"[]", "expected `object`, got `array`", None),
        (b"7", "expected `object`, got `int`", None),
        (b'{"model": "m"', "it ends too early, at byte 13", None),
        (b'{"model": "m",}', "at byte 14, near", None),
        (b'{"model": "m", "messages": []} x', "trailing characters at byte 32", None),
        (b'{"model": "m", "temperature": NaN}', "'temperature' must be a finite", "temperature"),
        (b'{"model": "m", "top_p": -Infinity}', "'top_p' must be a finite number", "top_p"),
        (b'{"model": "m", "temperature": 1e999}', "'temperature': number out", "temperature"),
        (b'{"model": "\xff"}', "not valid UTF-8: byte 11 is 0xff", None),
        (b'{"model": "\\ud800 and more"}', "surrogate", None),
        (b'{"tools": ' + b"[" * 100_000, "nested too deeply", None),
    ],
)
def test_a_body_that_is_no_json_says_where(body: bytes, message: str, param: str | None) -> None:
    with pytest.raises(RequestError) as error:
        parse_chat(body)
    assert message in str(error.value)
    assert error.value.param == param


REFUSED = {
    "audio": {"voice": "x"},
    "chat_template": "{{ x }}",
    "documents": [{}],
    "function_call": {"name": "f"},
    "functions": [{}],
    "modalities": ["text", "audio"],
    "moderation": {},
    "prediction": {},
    "prompt_cache_options": {"mode": "any"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "high",
    "service_tier": "flex",
    "store": True,
    "tool_choice": "required",
    "tools": [{"type": "function"}],
    "verbosity": "low",
    "web_search_options": {},
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_known_field_that_nothing_honours_is_refused_by_name(field: str) -> None:
    error = refused(NotSupported, **{field: REFUSED[field]})
    assert error.param == field
    assert error.code == "unsupported_parameter"
    assert f"'{field}' is not supported here" in str(error)
    assert chat(**{field: None}).model == "m"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"], "service_tier": "auto", "store": False, "verbosity": "medium"},
        {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k"},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
    ],
)
def test_values_that_change_nothing_are_accepted(fields: dict[str, Any]) -> None:
    assert chat(**fields).fields == {}


def test_every_field_is_honoured_harmless_or_refused() -> None:
    """A field added to a schema must be put somewhere."""
    honoured = {*Ask.__dataclass_fields__, *chat().sampling(1, 0).__struct_fields__}
    elsewhere = {
        "prompt",
        "stream_options",
        "max_completion_tokens",
        "top_logprobs",
        "include_stop_str_in_output",
        "chat_template_kwargs",
        "best_of",
        "suffix",
        "response_format",
        "guided_json",
        "guided_regex",
        "guided_grammar",
        "guided_choice",
        "structured_outputs",
    }
    harmless = {
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "parallel_tool_calls",
    }
    for fields in (ChatBody.__struct_fields__, CompletionBody.__struct_fields__):
        assert set(fields) <= honoured | elsewhere | harmless | set(REFUSED)


def test_logprobs_of_a_chat_need_both_fields_to_agree() -> None:
    assert chat(logprobs=True, top_logprobs=5).logprobs == 5
    assert chat(logprobs=True).logprobs == 0
    assert refused(RequestError, top_logprobs=5).param == "top_logprobs"
    assert refused(RequestError, logprobs=False, top_logprobs=0).param == "top_logprobs"
    assert refused(RequestError, logprobs=True, top_logprobs=21).param == "top_logprobs"


def test_the_two_names_of_max_tokens_may_not_differ() -> None:
    assert chat(max_tokens=5).max_tokens == 5
    assert chat(max_completion_tokens=6).max_tokens == 6
    assert chat(max_tokens=5, max_completion_tokens=5).max_tokens == 5
    error = refused(RequestError, max_tokens=5, max_completion_tokens=6)
    assert "max_tokens (5) and max_completion_tokens (6) differ" in str(error)


def test_stream_options_need_a_stream() -> None:
    assert refused(RequestError, stream_options={"include_usage": True}).param == "stream_options"
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage
    obfuscated = refused(NotSupported, stream=True, stream_options={"include_obfuscation": True})
    assert obfuscated.param == "stream_options.include_obfuscation"


def test_messages_become_what_templates_read() -> None:
    ask = chat(
        messages=[
            {
                "role": "system",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "user", "content": "Hi", "name": "Eva"},
            {"role": "assistant", "content": None, "refusal": "No."},
        ]
    )
    assert ask.messages == [
        {
            "role": "system",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "user", "content": "Hi", "name": "Eva"},
        {"role": "assistant", "content": "No."},
    ]


@pytest.mark.parametrize(
    ("error", "message", "param"),
    [
        (RequestError, {"role": "boss", "content": "Hi"}, "messages[0].role"),
        (NotSupported, {"role": "tool", "content": "Hi", "tool_call_id": "x"}, "messages[0].role"),
        (RequestError, {"role": "user"}, "messages[0].content"),
        (
            NotSupported,
            {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]},
            "messages[0].content[0].type",
        ),
        (
            RequestError,
            {"role": "user", "content": [{"type": "poem"}]},
            "messages[0].content[0].type",
        ),
        (
            RequestError,
            {"role": "user", "content": [{"type": "text"}]},
            "messages[0].content[0].text",
        ),
        (
            NotSupported,
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
            "messages[0].tool_calls",
        ),
    ],
)
def test_a_message_at_fault_is_named_by_its_path(
    error: type[RequestError], message: dict[str, Any], param: str
) -> None:
    assert refused(error, messages=[message]).param == param


def test_an_empty_chat_is_refused() -> None:
    assert "messages is empty" in str(refused(RequestError, messages=[]))


def test_continuing_a_message_and_beginning_one_exclude_each_other() -> None:
    assert chat().add_generation_prompt
    assert not chat(continue_final_message=True).add_generation_prompt
    assert not chat(add_generation_prompt=False).add_generation_prompt
    both = refused(RequestError, continue_final_message=True, add_generation_prompt=True)
    assert both.param == "continue_final_message"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", ["Hi"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_come_in_four_forms(prompt: Any, expected: Any) -> None:
    assert list(complete(prompt=prompt).prompts) == expected


@pytest.mark.parametrize("prompt", [[], ["a", 1], [[1], "a"], [1, [2]]])
def test_other_forms_of_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(RequestError) as error:
        complete(prompt=prompt)
    assert error.value.param == "prompt"


def test_a_completion_refuses_what_it_cannot_do_by_name() -> None:
    for fields, param in (
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
    ):
        with pytest.raises(NotSupported) as error:
            complete(**fields)
        assert error.value.param == param
    assert complete(best_of=2, n=2, suffix="", echo=True, logprobs=None).n == 2
    with pytest.raises(RequestError, match="more than 128 answers"):
        complete(prompt=["a"] * 2, n=MAX_CHOICES)
    with pytest.raises(RequestError, match="logprobs must be between 0 and 20"):
        complete(logprobs=21)


def test_the_choices_of_a_seeded_request_have_seeds_of_their_own_that_repeat() -> None:
    seeds = [chat(seed=5, n=4).sampling(1, choice).seed for choice in range(4)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 4
    assert seeds == [chat(seed=5, n=4).sampling(1, choice).seed for choice in range(4)]
    assert all(seed is not None and -(1 << 63) <= seed < 1 << 63 for seed in seeds)
    assert chat(n=2).sampling(1, 1).seed is None
