"""What templates take, found out by rendering, and messages in that form."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.unit.ingress.checkpoints import CHATML, byte_level_tokenizer
from tests.unit.ingress.test_template import TEMPLATES
from tests.unit.ingress.vision import BOTH, PARTS_ONLY
from trtllm_workers.ingress.content import Forms, shaped
from trtllm_workers.ingress.messages import IMAGE
from trtllm_workers.ingress.template import ChatTemplate

# In the manner of LLaVA's own: images before texts, roles in capitals, texts end with a space.
IMAGES_FIRST = """\
{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}
"""
# In the manner of Qwen2-VL's: a default system message, a frame around each image, numbers on demand.
FRAMED = """\
{% set count = namespace(value=0) %}{% for message in messages %}
{%- if loop.first and message['role'] != 'system' %}<|im_start|>system\\nBe kind.<|im_end|>\\n{% endif %}
{%- if message['content'] is string %}<|im_start|>{{ message['role'] }}\\n{{ message['content'] }}<|im_end|>
{% else %}<|im_start|>{{ message['role'] }}\\n
{%- for part in message['content'] %}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part %}
{%- set count.value = count.value + 1 %}{% if number %}Picture {{ count.value }}: {% endif -%}
<|vision_start|><image><|vision_end|>
{%- elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}
"""
DUMPS = "{% for message in messages %}{{ message.content | tojson }}{% endfor %}"
SEEING = {"both": BOTH, "parts": PARTS_ONLY, "first": IMAGES_FIRST, "framed": FRAMED}
SPECIAL = {"bos_token": "<s>", "eos_token": "<|im_end|>"}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, SPECIAL, where="here")


@pytest.mark.parametrize(
    ("source", "texts", "parts"),
    [
        (CHATML, True, False),
        (DUMPS, True, False),
        (BOTH, True, True),
        (PARTS_ONLY, False, True),
        (IMAGES_FIRST, False, True),
        (FRAMED, True, True),
        *((source, True, False) for source in TEMPLATES.values()),
        ("{{ raise_exception('never') }}", True, False),
    ],
)
def test_a_template_tells_what_it_takes(source: str, texts: bool, parts: bool) -> None:
    forms = template(source).forms
    assert (forms.texts, forms.parts) == (texts, parts)
    assert ("<image>" in forms.with_image) == parts


def test_parts_of_text_alone_take_no_images() -> None:
    source = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}"
    forms = template(source).forms
    assert forms.parts
    assert "<image>" not in forms.with_image


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.parametrize("begun", [True, False])
def test_images_are_rendered_as_transformers_does(name: str, begun: bool) -> None:
    reference = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=byte_level_tokenizer(), **SPECIAL
    )
    parts: list[dict[str, Any]] = [
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "and "}, IMAGE]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}, IMAGE]},
    ]
    expected = reference.apply_chat_template(
        parts, chat_template=SEEING[name], tokenize=False, add_generation_prompt=begun
    )
    assert template(SEEING[name]).render(parts, add_generation_prompt=begun) == expected
    # The same with the assistant's words as one text, which some of them do not take.
    words = [parts[0], {"role": "assistant", "content": "A cat."}, parts[2]]
    assert template(SEEING[name]).render(words, add_generation_prompt=begun) == expected


def test_a_template_that_wants_lists_is_given_them() -> None:
    prompt = template(IMAGES_FIRST).render([{"role": "user", "content": "Hi"}])
    assert prompt == "USER: Hi ASSISTANT:"


def test_several_images_of_one_file_stand_one_after_another() -> None:
    text = {"type": "text", "text": "x"}
    messages = [
        {"role": "user", "content": [IMAGE, text, IMAGE]},
        {"role": "user", "content": [IMAGE]},
    ]
    first, second = shaped(messages, Forms(texts=True, parts=True), [2, 1, 3])
    assert first["content"] == [IMAGE, IMAGE, text, IMAGE]
    assert second["content"] == [IMAGE] * 3
    assert messages[0]["content"] == [IMAGE, text, IMAGE], "what was asked stays as it was"


def test_texts_are_passed_on_untouched() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert shaped(messages, Forms(texts=True, parts=True)) is messages


def test_variables_reach_a_template_with_images() -> None:
    messages = [{"role": "user", "content": [IMAGE, IMAGE]}]
    prompt = template(FRAMED).render(messages, variables={"number": True})
    assert "Picture 1: <|vision_start|><image>" in prompt
    assert "Picture 2: <|vision_start|><image>" in prompt


@pytest.mark.parametrize("name", ["both", "parts", "framed"])
def test_a_last_message_of_parts_can_be_continued(name: str) -> None:
    messages = [
        {"role": "user", "content": [IMAGE]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "A"}, {"type": "text", "text": " c"}],
        },
    ]
    prompt = template(SEEING[name]).render(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert prompt.endswith("A c")
