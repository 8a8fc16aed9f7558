"""To which base model an adapter's name belongs. Pure: every ingress decides the same."""

from __future__ import annotations

from collections.abc import Iterable

from trtllm_workers.types import WorkerRecord


def homes(records: Iterable[WorkerRecord]) -> tuple[dict[str, str], list[str]]:
    """Return the base model of every adapter that can be served, and the clashes in words.

    A base model keeps its own name. Of two base models with an adapter of the same name, the one
    whose worker has held it longest has it, so that a newcomer takes nothing away.
    """
    bases: set[str] = set()
    since: dict[str, dict[str, float]] = {}
    for record in records:
        bases.add(record.model)
        for name in record.engine.loras:
            claims = since.setdefault(name, {})
            claims[record.model] = min(
                record.started_at_s, claims.get(record.model, record.started_at_s)
            )
    home: dict[str, str] = {}
    clashes: list[str] = []
    for name, claims in sorted(since.items()):
        owners = sorted(claims, key=lambda model: (claims[model], model))
        if name in bases:
            clashes.append(
                f"'{name}' is a base model and an adapter of {_quoted(owners)}; requests for it go to "
                "the base model; start the adapter's workers with another name (--lora NAME=DIR)"
            )
            continue
        home[name] = owners[0]
        if len(owners) > 1:
            clashes.append(
                f"adapter '{name}' belongs to {_quoted(owners)}; requests for it go to that of "
                f"'{owners[0]}'; give each a name of its own (--lora NAME=DIR)"
            )
    return home, clashes


def _quoted(names: list[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)
