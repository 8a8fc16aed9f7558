"""Structured logs: time, level, process, event and what is bound. Knows no place to write to.

::

    setup_logs("worker-0", fmt="json", level="info", path=None)    # once per process
    log = get_logger(__name__)                                      # at module level
    with bound(request_id="r1"):
        log.info("prefill done", prompt_tokens=512)

Records of other libraries (uvicorn, asyncio, warnings) come out in the same form. Give uvicorn
``log_config=None``, or it puts its own handlers back.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import structlog
from structlog.contextvars import bound_contextvars, merge_contextvars
from structlog.stdlib import LoggerFactory, ProcessorFormatter
from structlog.typing import EventDict, FilteringBoundLogger, Processor

from trtllm_workers.observe.log_sinks import SinkHandler, file_sink, stderr_sink

LogFormat = Literal["console", "json"]

REDACTED = "[redacted]"

# token is one, tokens and token_ids are counts and numbers.
_SECRET_KEY = re.compile(
    r"secret|passw(or)?d|authorization|api[_-]?key|(^|[_-])token$|credential", re.IGNORECASE
)
_SECRET_TEXT = re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE)
_DEEPEST = 6

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_COLOURS = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "31;1"}
_FIRST_KEYS = ("time", "level", "process", "event")

# Libraries that bring their own handlers, and those that say too much at level info.
_TAKEN_OVER = ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio", "py.warnings")
_CHATTY = ("httpx", "httpcore", "urllib3")


def get_logger(name: str) -> FilteringBoundLogger:
    """Return the logger of a module; a disabled level costs a call that does nothing."""
    logger: FilteringBoundLogger = structlog.get_logger(name)
    return logger


def bound(**names: Any) -> AbstractContextManager[None]:
    """Add ``names`` (request_id, worker_id) to every line logged inside, also by tasks begun there."""
    return bound_contextvars(**names)


def setup_logs(
    process: str,
    *,
    fmt: LogFormat,
    level: str,
    path: Path | None,
    colour: bool | None = None,
) -> None:
    """Send every log line of this process to standard error, and to ``path`` if there is one.

    Called again, it replaces its earlier set-up. ``level`` is debug, info, warning or error.
    ``colour`` None: when standard error is a terminal. Never raises for a place that cannot be
    written: lines are dropped and counted (see ``dropped_lines``) until it can.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    shared = _shared_processors(process)
    structlog.configure(
        processors=[*shared, ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    close_logs()
    if sys.stderr is not None:
        with_colour = sys.stderr.isatty() if colour is None else colour
        root.addHandler(_handler(SinkHandler(stderr_sink()), shared, fmt, with_colour))
    if path is not None:
        root.addHandler(_handler(SinkHandler(file_sink(path)), shared, fmt, colour=False))
    root.setLevel(number)
    for name in _TAKEN_OVER:
        taken = logging.getLogger(name)
        taken.handlers.clear()
        taken.propagate = True
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING if number > logging.DEBUG else number)
    logging.captureWarnings(True)


def close_logs() -> None:
    """Take our handlers away and close their files; safe without ``setup_logs`` and safe twice."""
    root = logging.getLogger()
    for handler in [one for one in root.handlers if isinstance(one, SinkHandler)]:
        root.removeHandler(handler)
        handler.close()


def dropped_lines() -> int:
    """Return how many lines could not be written and have not been reported yet."""
    handlers = logging.getLogger().handlers
    return sum(one.sink.dropped for one in handlers if isinstance(one, SinkHandler))


def _handler(
    handler: SinkHandler, shared: list[Processor], fmt: LogFormat, colour: bool
) -> SinkHandler:
    renderer: Processor = _Console(colour) if fmt == "console" else _json_renderer()
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[ProcessorFormatter.remove_processors_meta, _in_order, renderer],
        )
    )
    return handler


def _shared_processors(process: str) -> list[Processor]:
    def name_process(_logger: Any, _method: str, event: EventDict) -> EventDict:
        event["process"] = process
        return event

    return [
        merge_contextvars,
        structlog.stdlib.add_log_level,
        name_process,
        _stamp,
        structlog.processors.format_exc_info,
        _redact,
    ]


def _stamp(_logger: Any, _method: str, event: EventDict) -> EventDict:
    now = time.time()
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    event["time"] = f"{whole}.{int(now % 1 * 1000):03d}Z"
    return event


def _redact(_logger: Any, _method: str, event: EventDict) -> EventDict:
    return {key: _redacted(key, value) for key, value in event.items()}


def _redacted(key: object, value: Any, depth: int = 0) -> Any:
    if isinstance(key, str) and _SECRET_KEY.search(key) and value is not None:
        return REDACTED
    if isinstance(value, str):
        return _SECRET_TEXT.sub(rf"\1 {REDACTED}", value)
    if depth < _DEEPEST:
        if isinstance(value, Mapping):
            return {name: _redacted(name, inner, depth + 1) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [_redacted(None, inner, depth + 1) for inner in value]
    return value


def _in_order(_logger: Any, _method: str, event: EventDict) -> EventDict:
    first = {key: event.pop(key) for key in _FIRST_KEYS if key in event}
    return first | dict(event)


def _json_renderer() -> Processor:
    return structlog.processors.JSONRenderer(default=_safe_repr, ensure_ascii=False)


class _Console:
    """One line per event for people; a traceback follows on its own lines.

    Control characters are written as escapes, so that text from a request cannot forge a line or
    steer a terminal.
    """

    def __init__(self, colour: bool) -> None:
        self._colour = colour

    def __call__(self, _logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
        fields = dict(event)
        clock = str(fields.pop("time", ""))[11:-1]
        level = str(fields.pop("level", ""))
        process = fields.pop("process", "")
        if fields.get("worker_id") == process:
            del fields["worker_id"]  # a worker's lines name it already
        text = _one_line(str(fields.pop("event", "")))
        trace = fields.pop("exception", None)
        pairs = "".join(f"  {key}={_quoted(value)}" for key, value in fields.items())
        label = f"{level:<7}"
        if self._colour:
            label = f"\x1b[{_COLOURS.get(level, '0')}m{label}\x1b[0m"
        line = f"{clock} {label} {process}  {text}{pairs}"
        return f"{line}\n{trace}" if trace else line


def _safe_repr(value: object) -> str:
    try:
        return repr(value)
    except Exception as error:  # noqa: BLE001 - a log line must come out whatever a foreign repr does
        return f"<{type(value).__name__}: repr raised {type(error).__name__}>"


def _one_line(text: str) -> str:
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _quoted(value: Any) -> str:
    text = _one_line(value if isinstance(value, str) else _safe_repr(value))
    return f'"{text}"' if isinstance(value, str) and (not text or " " in text) else text
