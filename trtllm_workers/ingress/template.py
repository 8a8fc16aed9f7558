"""Chat messages to prompt text by the model's own template. Knows no tokenizer and no HTTP.

Rendered as Hugging Face renders: Jinja in an immutable sandbox, blocks trimmed, with ``tojson``,
``raise_exception``, ``strftime_now``, loop controls and the ``generation`` tag.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trtllm_workers.errors import ConfigError, RequestError
from trtllm_workers.ingress.content import Messages, last_text_of, probe, shaped

_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
)
# Where a template writes a message's name, in the spellings templates use.
_NAME = re.compile(r"message\w*(?:\.name\b|\[['\"]name['\"]\]|\.get\(['\"]name)")
_NOTHING: Mapping[str, Any] = {}


class _Refused(jinja2.TemplateError):
    """The template called raise_exception: it does not accept these messages."""


class _Generation(Extension):
    """``{% generation %}…{% endgeneration %}`` marks assistant text for training: just render it."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not jinja2's own filter: that one escapes HTML, and models were not trained on it.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # local time, as Hugging Face renders


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template. ``special_tokens`` are its variables bos_token, eos_token, …

    ConfigError when the text is no valid template; ``where`` names its file.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, where: str) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
            # As a plain dict: jinja2 copies it for every rendering, and a chain of maps is slow.
            self._template.globals = dict(self._template.globals)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{where}: chat template, line {error.lineno}: {error}") from error
        self.knows_developer = "developer" in source
        self.knows_name = _NAME.search(source) is not None
        self.forms = probe(self._render)

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        image_counts: Sequence[int] = (),
    ) -> str:
        """Return the prompt text. RequestError names what the template does not accept.

        ``image_counts``: how many images each image part of the messages stands for (default: one).
        """
        variables = variables or {}
        for name in variables:
            if name in _RESERVED:
                raise RequestError(
                    f"chat_template_kwargs may not set '{name}'", param="chat_template_kwargs"
                )
        text = self._render(
            shaped(messages, self.forms, image_counts),
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )
        return _cut_after_final(text, messages[-1]) if continue_final_message else text

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] = _NOTHING,
    ) -> str:
        try:
            return self._template.render(
                **{
                    **self._special_tokens,
                    "messages": messages,
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                    **variables,
                }
            )
        except _Refused as refused:
            raise RequestError(
                f"the model's chat template refuses these messages: {refused}", param="messages"
            ) from refused
        except jinja2.TemplateError as error:
            raise RequestError(
                f"the model's chat template cannot render these messages: {error}",
                param="messages",
            ) from error
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            # Templates are small programs: a value of another type than the author thought of
            # fails as it would in Python.
            raise RequestError(
                f"the model's chat template fails on these messages: "
                f"{type(error).__name__}: {error}",
                param="messages",
            ) from error


def _cut_after_final(text: str, final: Mapping[str, Any]) -> str:
    """Cut what the template wrote after the last message, so that the model goes on with it."""
    content = last_text_of(final["content"])
    at = text.rfind(content.strip())
    if not content.strip() or at < 0:
        raise RequestError(
            "continue_final_message: the last message's text does not appear in the rendered prompt",
            param="continue_final_message",
        )
    whole = content if text.startswith(content, at) else content.strip()
    return text[: at + len(whole)]


def load_chat_template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """Return the model's chat template, or None when it has none.

    ``chat_template.jinja`` wins over ``chat_template`` in tokenizer_config.json (``config``); of a
    list of named templates the one called ``default`` is used.
    """
    special_tokens = _special_tokens(folder, config)
    file = folder / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), special_tokens, where=str(file))
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source}
        source = named.get("default")
    if not source:
        return None
    if not isinstance(source, str):
        raise ConfigError(f"{folder}/tokenizer_config.json: chat_template is no text")
    return ChatTemplate(source, special_tokens, where=f"{folder}/tokenizer_config.json")


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return bos_token, eos_token, …: text, from plain strings or added-token objects."""
    file = folder / "special_tokens_map.json"
    try:
        mapped = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
    found: dict[str, str] = {}
    for name, value in {**mapped, **config}.items():
        if not name.endswith("_token"):
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found
