"""The engine configs we ship: no rule calls anything in them an error, alone or with their partner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.lint.documents import document
from trtllm_workers.lint.context import LintContext
from trtllm_workers.lint.document import Document
from trtllm_workers.lint.problem import Severity
from trtllm_workers.lint.rules import check
from trtllm_workers.types import Role

ROOT = Path(__file__).resolve().parents[3] / "engine_configs"
FREE = {"env_overrides", "cp_config", "moe_config.load_balancer"}
WORDS = {"prefill": Role.PREFILL, "decode": Role.DECODE, "encode": Role.ENCODE}
FOLDERS = sorted(
    {path.parent for path in ROOT.rglob("*.yaml") if path.parent != ROOT / "sim"}, key=str
)


def leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and key not in FREE:
            yield from leaves(value, f"{key}.")
        else:
            yield key, value or None if value == {} else value


def documents(folder: Path) -> list[Document]:
    found = []
    for path in sorted(folder.glob("*.yaml")):
        if path.name == "eplb.yaml":  # settings of a load balancer, no engine config
            continue
        role = next((role for word, role in WORDS.items() if word in path.name), Role.AGGREGATED)
        values = dict(leaves(yaml.safe_load(path.read_text()) or {}))
        found.append(document(role, values, name=str(path.relative_to(ROOT)), path=path))
    return found


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_shipped_config_has_an_error(folder: Path) -> None:
    context = LintContext(
        router="least_loaded", gpus_per_node=8, kv_transport="UCX", sets_role_keys=True
    )
    found = check(documents(folder), context)
    assert [p for p in found if p.severity is Severity.ERROR] == []


def test_there_are_pairs_to_check() -> None:
    pairs = [
        {doc.role for doc in documents(folder)} >= {Role.PREFILL, Role.DECODE} for folder in FOLDERS
    ]
    assert any(pairs)
