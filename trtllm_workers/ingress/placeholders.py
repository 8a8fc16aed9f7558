"""Where a prompt's images stand: placeholders in its text, and the tokens that they become. Pure.

A placeholder that somebody writes into a text would move or add an image, so no text may hold one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from trtllm_workers.errors import EngineError, NotSupported, RequestError
from trtllm_workers.ingress.content import text_of
from trtllm_workers.ingress.openai import Ask
from trtllm_workers.ingress.template import ChatTemplate
from trtllm_workers.types import MediaItem, VisionInfo


def check_images(ask: Ask, template: ChatTemplate | None, vision: VisionInfo | None) -> VisionInfo:
    """Refuse a chat whose images its model cannot take, before anybody looks at them."""
    path = ask.references[0].param
    if vision is None:
        raise NotSupported(f"model '{ask.model}' takes text only", param=path)
    if template is None:
        raise NotSupported(
            f"model '{ask.model}' has no chat template, so it has no place for images", param=path
        )
    if vision.placeholder not in template.forms.with_image:
        raise NotSupported(
            f"the chat template of '{ask.model}' has no place for images: it does not write "
            f"'{vision.placeholder}' for an image in a message; the operator can give the model "
            "another chat_template.jinja",
            param=path,
        )
    refuse_written(ask, vision.placeholder)
    return vision


def refuse_written(ask: Ask, placeholder: str) -> None:
    """Raise RequestError naming the text of a request that holds a placeholder."""
    for at, message in enumerate(ask.messages):
        if placeholder in text_of(message["content"]):
            raise _written(placeholder, f"messages[{at}].content")
        if placeholder in message.get("name", ""):
            raise _written(placeholder, f"messages[{at}].name")
    if ask.template_variables and _is_in(ask.template_variables, placeholder):
        raise _written(placeholder, "chat_template_kwargs")
    for prompt in ask.prompts:
        if isinstance(prompt, str) and placeholder in prompt:
            raise _written(placeholder, "prompt")


def _is_in(value: Any, placeholder: str) -> bool:
    if isinstance(value, str):
        return placeholder in value
    if isinstance(value, Mapping):
        return any(
            _is_in(key, placeholder) or _is_in(one, placeholder) for key, one in value.items()
        )
    return isinstance(value, list) and any(_is_in(one, placeholder) for one in value)


def _written(placeholder: str, path: str) -> RequestError:
    return RequestError(
        f"{path} holds the text '{placeholder}', which stands for an image in this model's prompts; "
        "send images as image_url parts of a chat, and leave that text out",
        param=path,
    )


def refuse_tokens(ask: Ask, token_ids: Sequence[int], vision: VisionInfo) -> None:
    """Raise RequestError when a prompt without images holds a placeholder's token."""
    if vision.image_token_id in token_ids:
        raise RequestError(
            f"the prompt holds token {vision.image_token_id} ('{vision.placeholder}'), which stands for "
            "an image in this model's prompts; send images as image_url parts of a chat",
            param="messages" if ask.chat else "prompt",
        )


def expand(
    ask: Ask, token_ids: Sequence[int], items: Sequence[MediaItem], vision: VisionInfo
) -> tuple[list[int], tuple[MediaItem, ...]]:
    """Return the tokens with every placeholder made as long as its image, and the items with offsets."""
    image = vision.image_token_id
    found = token_ids.count(image)
    if found != len(items):
        raise RequestError(
            f"the chat template of '{ask.model}' writes {found} placeholders "
            f"('{vision.placeholder}') for {len(items)} images; it may not take images in messages of "
            "every role: move them to a message of the user",
            param=ask.references[0].param if len(ask.references) == 1 else "messages",
        )
    expanded: list[int] = []
    media: list[MediaItem] = []
    done = 0
    for item in items:
        at = token_ids.index(image, done)
        expanded += token_ids[done:at]
        media.append(msgspec.structs.replace(item, offset=len(expanded)))
        expanded += [image] * item.num_tokens
        done = at + 1
    expanded += token_ids[done:]
    return expanded, tuple(media)


def check_items(items: Sequence[Sequence[MediaItem]], count: int) -> None:
    """Raise EngineError unless a worker made something of every one of ``count`` images."""
    if len(items) != count or not all(
        of_one and all(item.num_tokens > 0 and item.holder is not None for item in of_one)
        for of_one in items
    ):
        raise EngineError("the worker that encodes images left one of them out")
