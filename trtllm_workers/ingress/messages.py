"""Chat messages from their wire form to what a template reads. Knows roles and parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trtllm_workers.errors import NotSupported, RequestError
from trtllm_workers.ingress.schema import Message, Part

ROLES = ("system", "developer", "user", "assistant")
_TOOL_ROLES = ("tool", "function")
_TOOL_FIELDS = ("tool_calls", "tool_call_id", "function_call", "audio")
_MEDIA_PARTS = ("image_url", "input_audio", "file", "video_url")


def as_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages as templates know them: role, content as one text, name if given.

    Raises RequestError with the path of the field at fault, NotSupported for what is known but not
    honoured: tools, images, audio, files.
    """
    if not messages:
        raise RequestError("messages is empty; send at least one message", param="messages")
    return [_as_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


def _as_message(message: Message, path: str) -> dict[str, Any]:
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
        "content": _as_text(message.content, message.refusal, f"{path}.content"),
    }
    if message.name is not None:
        rendered["name"] = message.name
    return rendered


def _as_text(content: str | list[Part] | None, refusal: str | None, path: str) -> str:
    if content is None:
        if refusal is None:
            raise RequestError(f"{path} is missing", param=path)
        return refusal  # what the assistant said then, instead of an answer
    if isinstance(content, str):
        return content
    return "".join(_part_text(part, f"{path}[{at}]") for at, part in enumerate(content))


def _part_text(part: Part, path: str) -> str:
    if part.type in _MEDIA_PARTS:
        raise NotSupported(
            f"{path}: '{part.type}' parts are not supported here; this model takes text",
            param=f"{path}.type",
        )
    if part.type == "text" and part.text is not None:
        return part.text
    if part.type == "refusal" and part.refusal is not None:
        return part.refusal
    if part.type in ("text", "refusal"):
        raise RequestError(f"{path}.{part.type} is missing", param=f"{path}.{part.type}")
    raise RequestError(f"{path}.type must be 'text', not '{part.type[:40]}'", param=f"{path}.type")
