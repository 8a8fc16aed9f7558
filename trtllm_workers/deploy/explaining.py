"""Decisions of a router as text, and which ingress to ask for them. Asks nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from trtllm_workers.config.tables import table
from trtllm_workers.deploy.run import Run
from trtllm_workers.errors import ConfigError

_COLUMNS = (
    ("worker", "worker_id"),
    ("cost", "cost"),
    ("cached", "overlap_tokens"),
    ("to compute", "uncached_tokens"),
    ("waiting", "waiting_tokens"),
    ("requests", "running"),
    ("free blocks", "free_blocks"),
    ("capped", "capped"),
)


def url_of_run(runs: Sequence[Run]) -> str:
    """Return the address of the only run that serves. Raises ConfigError when that is not clear."""
    urls = {
        run.run_id: run.record.url
        for run in runs
        if run.alive and run.record is not None and run.record.url
    }
    if len(urls) == 1:
        return next(iter(urls.values()))
    if not urls:
        raise ConfigError("no run serves on this host; say which ingress to ask with --url")
    listed = ", ".join(f"{run_id} at {url}" for run_id, url in urls.items())
    raise ConfigError(f"several runs serve here ({listed}); say which with --url")


def error_of(body: bytes, status: int, url: str) -> str:
    """Return what an ingress said about a question it could not answer."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return f"{url} answered {status} and is no ingress of this version"


def as_text(told: Mapping[str, Any]) -> str:
    """Return one decision, or a list of them, for people."""
    if "decisions" not in told:
        return _whole(told)
    decisions = told["decisions"]
    if not decisions:
        return "this ingress has placed no request yet"
    rows = [
        (
            one["request_id"],
            one["prefill"]["worker_id"] if "prefill" in one else "-",
            one["maker"]["worker_id"],
            "{overlap_tokens}/{prompt_tokens}".format(**one.get("prefill", one["maker"])),
            one.get("prefill", one["maker"])["reason"],
        )
        for one in decisions
    ]
    return table(("request", "prefill", "tokens from", "cached", "why"), rows)


def _whole(one: Mapping[str, Any]) -> str:
    lines = [f"request {one['request_id'] or '(not sent)'} for {one['model']}: {one['strategy']}"]
    if why := one.get("why_no_prefill_worker"):
        lines.append(f"no prefill worker was chosen: {why}")
    for part, name in (("prefill", "prefill worker"), ("maker", "worker that streams the tokens")):
        if part in one:
            choice = one[part]
            lines += [
                "",
                f"{name}: {choice['worker_id']} (mode {choice['mode']}): {choice['reason']}",
                table(
                    tuple(title for title, _ in _COLUMNS),
                    [tuple(_cell(row[key]) for _, key in _COLUMNS) for row in choice["candidates"]],
                ),
            ]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
