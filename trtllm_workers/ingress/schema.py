"""The fields of OpenAI's two text endpoints, by type alone. What values mean is in ``openai.py``.

Every field of the API is named here, also those that nothing honours yet: a name that is missing
would be reported as a typing mistake.
"""

from __future__ import annotations

from typing import Any

import msgspec

Number = float | None
Whole = int | None
Flag = bool | None


class Part(msgspec.Struct, forbid_unknown_fields=True):
    """One part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    video_url: Any = None


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One message of a chat, as it comes."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None
    annotations: list[Any] | None = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Options of a streamed answer."""

    include_usage: Flag = None
    include_obfuscation: Flag = None


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    """What ``response_format`` of type json_schema holds. ``strict`` or not, the schema is kept to."""

    name: str
    schema: dict[str, Any]
    strict: Flag = None
    description: str | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """OpenAI's way to say what an answer must look like."""

    type: str
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """The same as other servers know it; one of these is set."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None
    json_object: Flag = None


class Common(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that both endpoints have: OpenAI's, then the extensions other servers know."""

    model: str
    max_tokens: Whole = None
    temperature: Number = None
    top_p: Number = None
    n: Whole = None
    stream: Flag = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: Number = None
    frequency_penalty: Number = None
    logit_bias: dict[str, float] | None = None
    seed: Whole = None
    user: str | None = None

    top_k: Whole = None
    min_p: Number = None
    repetition_penalty: Number = None
    stop_token_ids: list[int] | None = None
    ignore_eos: Flag = None
    min_tokens: Whole = None
    include_stop_str_in_output: Flag = None
    skip_special_tokens: Flag = None
    cache_salt: str | None = None

    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None


class ChatBody(Common, forbid_unknown_fields=True, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: Whole = None
    logprobs: Flag = None
    top_logprobs: Whole = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    response_format: ResponseFormat | None = None

    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    moderation: Any = None
    parallel_tool_calls: Flag = None
    prediction: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    service_tier: Any = None
    store: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    add_generation_prompt: Flag = None
    continue_final_message: Flag = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: Any = None
    documents: Any = None


class CompletionBody(Common, forbid_unknown_fields=True, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: Whole = None
    echo: Flag = None
    best_of: Whole = None
    suffix: Any = None
