"""What doctor says: one finding per question, as a line for people or a value for machines. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from trtllm_workers.config.tables import table

Level = Literal["ok", "note", "problem"]

# Section → its subjects; subjects in none of them are the engine's.
SECTIONS = {
    "host": (
        *("system", "memory", "disk", "/dev/shm", "open files", "memlock", "processes"),
        "shared memory",
    ),
    "software": ("python", "packages", "tokenizer", "uvloop", "torch", "packages of TensorRT-LLM"),
    "settings": ("settings",),
    "images": ("images",),
    "gpu": ("gpu", "gpus", "driver"),
    "ports": ("port", "free ports"),
    "runs": ("runs", "left-overs"),
    "transport": ("UCX", "NIXL", "KV transport"),
    "mpi": ("MPI", "mpirun"),
    "services": ("etcd", "NATS"),
    "slurm": ("SLURM", "SLURM MPI"),
}


class Finding(msgspec.Struct, frozen=True):
    """One answer. A ``problem`` keeps this configuration from running; a ``note`` does not.

    ``fix`` is a command, or what to change, where there is something to do. ``section`` groups subjects
    for machines; see ``SECTIONS``.
    """

    level: Level
    subject: str
    text: str
    fix: str = ""
    section: str = ""


def ok(subject: str, text: str) -> Finding:
    """Everything is as it should be."""
    return Finding("ok", subject, text)


def note(subject: str, text: str, fix: str = "") -> Finding:
    """Worth knowing; nothing fails because of it."""
    return Finding("note", subject, text, fix)


def problem(subject: str, text: str, fix: str = "") -> Finding:
    """This configuration cannot run, or not for long."""
    return Finding("problem", subject, text, fix)


def in_section(one: Finding) -> Finding:
    """Return a finding with its section."""
    section = next((name for name, known in SECTIONS.items() if one.subject in known), "engine")
    return msgspec.structs.replace(one, section=section)


def as_text(findings: Sequence[Finding]) -> str:
    """Return a table of findings, what to do below each, and a verdict."""
    lines: list[str] = []
    rows = table(
        ("", "", ""), [(one.level, one.subject, one.text.replace("\n", " ")) for one in findings]
    )
    for one, row in zip(findings, rows.split("\n")[1:], strict=True):
        lines.append(row)
        lines += [f"           → {fix}" for fix in one.fix.split("\n") if fix]
    bad = sum(one.level == "problem" for one in findings)
    verdict = "everything that is needed is here" if not bad else _count(bad)
    return "\n".join([*lines, "", verdict])


def _count(bad: int) -> str:
    return "1 problem to solve first" if bad == 1 else f"{bad} problems to solve first"
