"""Documents tell the truth: their ``bash`` blocks run, their curl and Python examples answer."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    path
    for folder in (
        ".",
        "launch",
        "engine_configs",
        "container",
        "multinode",
        "benchmarks",
        "docs",
        "docs/guides",
    )
    for path in sorted((ROOT / folder).glob("*.md"))
]


def blocks(document: Path, language: str) -> list[str]:
    found = re.findall(
        rf"^```{language}\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE
    )
    return [str(block) for block in found]


BASH = [
    pytest.param(block, id=f"{document.relative_to(ROOT)}-{index}")
    for document in DOCUMENTS
    for index, block in enumerate(blocks(document, "bash"))
]


@pytest.mark.parametrize("block", BASH)
def test_every_bash_block_runs(block: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path)},  # what mktemp leaves goes with it
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}{done.stderr}"


def test_the_documents_have_bash_blocks_to_run() -> None:
    assert BASH


def test_the_http_document_names_every_field_there_is() -> None:
    from trtllm_workers.ingress.schema import ChatBody, CompletionBody

    named = set(re.findall(r"`([a-z_]+)`", (ROOT / "docs" / "http.md").read_text()))
    fields = {*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__}
    assert fields <= named, f"docs/http.md lacks {sorted(fields - named)}"
