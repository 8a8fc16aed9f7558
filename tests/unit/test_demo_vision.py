"""The tiny models of images and text speak as their families do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtllm_workers.config.vision_model import read_vision
from trtllm_workers.demo.vision import FAMILIES

IMAGE = {"type": "image"}


def chat(folder: Path, *contents: Any) -> str:
    from transformers import AutoTokenizer

    kind: Any = AutoTokenizer
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": each} for at, each in enumerate(contents)]
    text: str = kind.from_pretrained(folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_holds_one_placeholder_an_image_and_its_text(
    family: str, vision_model: Callable[[str], Path]
) -> None:
    from transformers import AutoTokenizer

    folder = vision_model(family)
    vision = read_vision(folder)
    assert vision is not None
    text = chat(folder, [IMAGE, {"type": "text", "text": "What is it?"}, IMAGE], "A cat.", "Sure?")
    assert text.count(vision.placeholder) == 2
    assert "What is it?" in text
    assert "A cat." in text
    kind: Any = AutoTokenizer
    ids = kind.from_pretrained(folder)(text)["input_ids"]
    assert ids.count(vision.image_token_id) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_strings_are_text(family: str, vision_model: Callable[[str], Path]) -> None:
    folder = vision_model(family)
    assert chat(folder, "Hello") == chat(folder, [{"type": "text", "text": "Hello"}])
