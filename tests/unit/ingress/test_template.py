from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.unit.ingress.checkpoints import CHATML, byte_level_tokenizer
from trtllm_workers.errors import ConfigError, RequestError
from trtllm_workers.ingress.template import ChatTemplate, load_chat_template

SPECIAL = {"bos_token": "<s>", "eos_token": "<|im_end|>"}

HEADERS = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\nToday: " + strftime_now("%Y") + "\\n" + system_message + "<|eot|>" }}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""
BRACKETS = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ ' [INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{% endif %}
{% endfor %}
"""
LOGIC = """\
{%- macro show(value) %}{{ value | tojson(indent=2) }}{% endmacro -%}
{%- set ns = namespace(last=0, thinking=enable_thinking|default(true)) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" %}{% set ns.last = loop.revindex0 %}{% break %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "system" %}{% continue %}{% endif %}
<{{ message.role }}{% if loop.index0 == ns.last %} last{% endif %}>{{ show({"t": message.content, "é": "<&>"}) }}
{% endfor %}
{%- if add_generation_prompt %}<assistant>{% if not ns.thinking %}<no-think>{% endif %}{% endif %}
"""
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "brackets": BRACKETS, "logic": LOGIC}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": ' 日本 "quotes" <b>&amp;</b>\n\n'}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello there "},
        {"role": "user", "content": "What's up?"},
    ],
]
SYSTEM = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers has no types here
        tokenizer_object=byte_level_tokenizer(), **SPECIAL
    )


def chat_template(source: str) -> ChatTemplate:
    return ChatTemplate(source, SPECIAL, where="here")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(
    reference: PreTrainedTokenizerFast, name: str, prompt: bool
) -> None:
    template = chat_template(TEMPLATES[name])
    for messages in [*CHATS, *([] if name == "brackets" else [SYSTEM])]:
        expected = reference.apply_chat_template(
            messages,
            chat_template=TEMPLATES[name],
            tokenize=False,
            add_generation_prompt=prompt,
            enable_thinking=False,
        )
        rendered = template.render(
            messages, add_generation_prompt=prompt, variables={"enable_thinking": False}
        )
        assert rendered == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("final", ["The answer is", "The answer is ", " The"])
def test_continues_the_final_message_as_transformers_does(
    reference: PreTrainedTokenizerFast, name: str, final: str
) -> None:
    if name == "logic":
        final = final.strip()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": final}]
    expected = reference.apply_chat_template(
        messages, chat_template=TEMPLATES[name], tokenize=False, continue_final_message=True
    )
    rendered = chat_template(TEMPLATES[name]).render(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert rendered == expected


def test_what_the_template_refuses_is_the_callers_error_in_its_words() -> None:
    with pytest.raises(RequestError, match="Roles must alternate user/assistant") as refused:
        chat_template(BRACKETS).render([{"role": "assistant", "content": "Hi"}])
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[7].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages | nofilter }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_a_named_error(source: str) -> None:
    with pytest.raises((RequestError, ConfigError), match="chat template"):
        chat_template(source).render([{"role": "user", "content": "Hi"}])


def test_a_template_with_a_syntax_error_names_file_and_line() -> None:
    with pytest.raises(ConfigError, match="here: chat template, line 2"):
        chat_template("{{ a }}\n{% if %}")


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_template_variables_cannot_replace_the_messages(name: str) -> None:
    with pytest.raises(RequestError, match=f"may not set '{name}'"):
        chat_template(CHATML).render(CHATS[0], variables={name: []})


def test_the_current_time_is_local() -> None:
    assert chat_template(HEADERS).render(CHATS[0]).count(str(datetime.now().year)) == 1


@pytest.mark.parametrize(
    ("files", "config", "expected"),
    [
        ({}, {"chat_template": "plain"}, "plain"),
        ({"chat_template.jinja": "file"}, {"chat_template": "plain"}, "file"),
        (
            {},
            {
                "chat_template": [
                    {"name": "tool_use", "template": "tools"},
                    {"name": "default", "template": "{{ bos_token }}default"},
                ],
                "bos_token": {"content": "<s>"},
            },
            "<s>default",
        ),
        (
            {"special_tokens_map.json": json.dumps({"eos_token": "</s>"})},
            {"chat_template": "{{ eos_token }}"},
            "</s>",
        ),
    ],
)
def test_finds_the_template_where_checkpoints_keep_it(
    tmp_path: Path, files: dict[str, str], config: dict[str, Any], expected: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    template = load_chat_template(tmp_path, config)
    assert template is not None
    assert template.render(CHATS[0]) == expected


def test_a_model_without_a_template_has_none(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path, {}) is None
    named = {"chat_template": [{"name": "tool_use", "template": "x"}]}
    assert load_chat_template(tmp_path, named) is None


def test_a_template_that_is_no_text_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chat_template is no text"):
        load_chat_template(tmp_path, {"chat_template": 7})
