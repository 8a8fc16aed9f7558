"""One engine config as rules see it: typed values with their places, and defaults behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_workers.lint.problem import Problem, Severity
from trtllm_workers.types import Role


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value came from: ``source`` is ``file.yaml:7``, a flag, a variable, or a role."""

    source: str
    line: int = 0
    column: int = 0


@dataclass(frozen=True, slots=True)
class Document:
    """An engine config of one role, read and type-checked (``read.py``).

    ``values`` holds every given key by dotted name: leaves and free mappings as plain Python values, each
    of the right type (a wrong one was reported and is absent). A section that is given as null
    (``cuda_graph_config: null``) stands in ``values`` as None. ``defaults`` are the schema's for
    all other leaves, those of sections that are null by default included. ``places`` has every given
    key and section.
    """

    name: str
    role: Role
    path: Path | None
    values: Mapping[str, Any]
    defaults: Mapping[str, Any]
    places: Mapping[str, Place] = field(default_factory=dict)
    version: str = "1.2.1"

    def get(self, key: str) -> Any:
        """Return the value of a leaf: as given, else TensorRT-LLM's default (None: there is none)."""
        if key in self.values:
            return self.values[key]
        return self.defaults.get(key)

    def given(self, key: str) -> bool:
        """Return whether a key or section stands in the file or came from a flag."""
        return key in self.places

    def has_section(self, section: str) -> bool:
        """Return whether a section that is off by default has been given with keys."""
        return any(key.startswith(f"{section}.") for key in self.values)

    def place(self, key: str) -> Place:
        """Return where ``key`` stands; for one that does not, where its section does, else the file."""
        while key:
            if key in self.places:
                return self.places[key]
            key = key.rpartition(".")[0]
        return Place(self.name)

    def problem(
        self,
        severity: Severity,
        rule: str,
        key: str,
        message: str,
        *,
        advice: str = "",
        arithmetic: tuple[str, ...] = (),
    ) -> Problem:
        """Return a finding at ``key`` of this document."""
        place = self.place(key)
        return Problem(
            severity,
            rule,
            message,
            file=self.name,
            line=place.line,
            column=place.column,
            key=key,
            advice=advice,
            arithmetic=arithmetic,
        )
