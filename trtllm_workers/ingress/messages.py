"""Chat messages from their wire form to values with checked parts. Knows roles and parts, no template."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from trtllm_workers.errors import NotSupported, RequestError
from trtllm_workers.ingress.schema import Message, Part
from trtllm_workers.types import MediaReference

ROLES = ("system", "developer", "user", "assistant")
MAX_IMAGES = 256
MAX_URL_CHARACTERS = 8192
_TOOL_ROLES = ("tool", "function")
_TOOL_FIELDS = ("tool_calls", "tool_call_id", "function_call", "audio")
_OTHER_MEDIA = ("input_audio", "file", "video_url")
_TEXTS = ("text", "refusal")
_CONTENTS = (*_TEXTS, "image_url", *_OTHER_MEDIA)
_IMAGE_FIELDS = ("url", "detail")

# What stands for an image in a message's content until it is known how many it holds.
IMAGE = {"type": "image"}


def as_messages(
    messages: Sequence[Message],
) -> tuple[list[dict[str, Any]], tuple[MediaReference, ...]]:
    """Return the messages (role, content, name if given) and their images, in order.

    Content is a text or a list of parts, ``IMAGE`` and ``{"type": "text", "text": …}``; see ``content.py``.

    Raises RequestError with the path of the field at fault, NotSupported for what is known but not
    honoured: tools, audio, files, video.
    """
    if not messages:
        raise RequestError("messages is empty; send at least one message", param="messages")
    images: list[MediaReference] = []
    found = [_as_message(message, f"messages[{at}]", images) for at, message in enumerate(messages)]
    if len(images) > MAX_IMAGES:
        raise RequestError(
            f"the request has {len(images)} images; at most {MAX_IMAGES} are accepted",
            param=images[MAX_IMAGES].param,
        )
    return found, tuple(images)


def _as_message(message: Message, path: str, images: list[MediaReference]) -> dict[str, Any]:
    if message.role not in ROLES:
        if message.role in _TOOL_ROLES:
            raise NotSupported(
                f"{path}.role: '{message.role}' messages (tools) are not supported here",
                param=f"{path}.role",
            )
        raise RequestError(
            f"{path}.role must be one of {', '.join(ROLES)}; not '{message.role[:40]}'",
            param=f"{path}.role",
        )
    for field in _TOOL_FIELDS:
        if getattr(message, field):
            raise NotSupported(f"{path}.{field} is not supported here", param=f"{path}.{field}")
    rendered: dict[str, Any] = {
        "role": message.role,
        "content": _content(message.content, message.refusal, f"{path}.content", images),
    }
    if message.name is not None:
        rendered["name"] = message.name
    return rendered


def _content(
    content: str | list[Part] | None,
    refusal: str | None,
    path: str,
    images: list[MediaReference],
) -> str | list[dict[str, str]]:
    if content is None:
        if refusal is None:
            raise RequestError(f"{path} is missing", param=path)
        return refusal  # what the assistant said then, instead of an answer
    if isinstance(content, str):
        return content
    parts: list[dict[str, str]] = []
    for at, part in enumerate(content):
        if part.type == "image_url":
            images.append(_image(part, f"{path}[{at}]"))
            parts.append(IMAGE)
        else:
            parts.append({"type": "text", "text": _text(part, f"{path}[{at}]")})
    return parts


def _text(part: Part, path: str) -> str:
    if part.type in _OTHER_MEDIA:
        raise NotSupported(
            f"{path}: '{part.type}' parts are not supported here; send text and images",
            param=f"{path}.type",
        )
    if part.type not in _TEXTS:
        raise RequestError(
            f"{path}.type must be 'text' or 'image_url', not '{part.type[:40]}'",
            param=f"{path}.type",
        )
    _refuse_others(part, path)
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise RequestError(f"{path}.{part.type} is missing", param=f"{path}.{part.type}")
    return text


def _refuse_others(part: Part, path: str) -> None:
    """A part of one type does not bring the content of another along: that would go unseen."""
    for field in _CONTENTS:
        if field != part.type and getattr(part, field) is not None:
            raise RequestError(
                f"{path}.{field} is not for a part of type '{part.type}'; make it a part of its own",
                param=f"{path}.{field}",
            )


def _image(part: Part, path: str) -> MediaReference:
    _refuse_others(part, path)
    path = f"{path}.image_url"
    given = part.image_url
    if given is None:
        raise RequestError(f"{path} is missing", param=path)
    if isinstance(given, str):
        return MediaReference(_checked_url(given, path), path)
    if not isinstance(given, dict):
        raise RequestError(f'{path} must be {{"url": …}} or a URL', param=path)
    for name in given:
        if name not in _IMAGE_FIELDS:
            near = difflib.get_close_matches(str(name), _IMAGE_FIELDS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            where = f"{path}.{str(name)[:80]}"
            raise RequestError(f"unknown field '{where}'{hint}", param=where)
    _check_detail(given.get("detail"), f"{path}.detail")
    url = given.get("url")
    if not isinstance(url, str):
        what = "is missing" if url is None else "must be text"
        raise RequestError(f"{path}.url {what}", param=f"{path}.url")
    return MediaReference(_checked_url(url, f"{path}.url"), path)


def _check_detail(detail: object, path: str) -> None:
    if detail in ("low", "high"):
        raise NotSupported(
            f"{path}: '{detail}' is not supported here, the model takes images in one way; "
            "leave it out or set it to 'auto'",
            param=path,
        )
    if detail not in (None, "auto"):
        raise RequestError(f"{path} must be 'auto', not {str(detail)[:40]!r}", param=path)


def _checked_url(url: str, path: str) -> str:
    if not url.strip():
        raise RequestError(f"{path} is empty", param=path)
    if len(url) > MAX_URL_CHARACTERS and url[:5].lower() != "data:":
        raise RequestError(
            f"{path} has {len(url)} characters; a URL that is no data: URL has at most "
            f"{MAX_URL_CHARACTERS}",
            param=path,
        )
    return url
