"""In which form a chat template takes a message's content, found out by rendering. Knows no model.

Some templates take a text, some a list of parts, some both. What a template cannot take it mostly does not
refuse: it writes nothing, or Python's notation of a list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trtllm_workers.errors import RequestError
from trtllm_workers.ingress.messages import IMAGE

Messages = Sequence[dict[str, Any]]

# Nothing that a template would write on its own; the second one shows that it dumps a part as it is.
_TEXT = "zq7text"
_KEY = "zq7key"


@dataclass(frozen=True, slots=True)
class Forms:
    """``texts``: content may be a text. ``parts``: it may be a list of parts. ``with_image`` is what the
    template makes of a message with an image, "" when it takes none.
    """

    texts: bool
    parts: bool
    with_image: str = ""


def probe(render: Callable[[Messages], str]) -> Forms:
    """Find out what a template takes. One that refuses all of it is taken to want texts."""
    part = {"type": "text", "text": _TEXT, _KEY: _KEY}
    texts = _TEXT in _rendered(render, _TEXT)
    in_parts = _rendered(render, [part])
    parts = _TEXT in in_parts and _KEY not in in_parts
    if not parts:
        return Forms(texts=True, parts=False)
    with_image = _rendered(render, [{**IMAGE, _KEY: _KEY}, {"type": "text", "text": _TEXT}])
    shown = _TEXT in with_image and _KEY not in with_image
    return Forms(texts, parts, with_image if shown else "")


def _rendered(render: Callable[[Messages], str], content: str | list[dict[str, str]]) -> str:
    try:
        return render([{"role": "user", "content": content}])
    except RequestError:
        return ""


def shaped(messages: Messages, forms: Forms, counts: Sequence[int] = ()) -> Messages:
    """Return the messages as the template takes them.

    ``counts`` tells for each image how many stand there: a file may hold several.
    """
    if forms.texts and all(isinstance(message["content"], str) for message in messages):
        return messages
    left = iter(counts)
    return [
        {**message, "content": _shaped(message["content"], forms, left)} for message in messages
    ]


def _shaped(content: Any, forms: Forms, counts: Any) -> Any:
    if isinstance(content, str):
        return content if forms.texts else [{"type": "text", "text": content}]
    if forms.texts and IMAGE not in content:
        return text_of(content)
    parts: list[dict[str, str]] = []
    for part in content:
        parts += [IMAGE] * next(counts, 1) if part == IMAGE else [part]
    return parts


def text_of(content: Any) -> str:
    """Return all text of a message's content."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def last_text_of(content: Any) -> str:
    """Return the text that a message ends with; "" when it ends with an image."""
    if isinstance(content, str) or not content:
        return content or ""
    text: str = content[-1].get("text", "")
    return text
