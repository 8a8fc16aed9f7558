"""The tree keeps its own rules: file sizes, links, version and changelog, secrets of no one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import trtllm_workers

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 500


def tracked(pattern: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_python_file_is_longer_than_one_can_read() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked("*.py")
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long


def test_every_module_says_what_it_does_in_its_first_line() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in tracked("trtllm_workers/*.py")
        if not re.match(r'(#[^\n]*\n)*r?"""\S', path.read_text())
    ]
    assert not silent


@pytest.mark.parametrize("document", tracked("*.md"), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    broken = [
        target
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
        if not re.match(r"[a-z]+:", target) and not (document.parent / target).exists()
    ]
    assert not broken


def test_the_changelog_speaks_of_this_version_first() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert first is not None
    assert first.group(1) == trtllm_workers.__version__
    assert f'version = "{trtllm_workers.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_launchers_are_at_most_30_lines() -> None:
    long = {
        path.name: lines
        for path in tracked("launch/*.sh")
        if (lines := len(path.read_text().splitlines())) > 30
    }
    assert not long
