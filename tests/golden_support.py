"""Compare text with a file under tests/golden; ``pytest --update-golden`` writes it instead."""

from __future__ import annotations

from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


def check_golden(name: str, text: str, *, update: bool) -> None:
    """Compare ``text`` with ``tests/golden/<name>``; a missing file fails unless updating."""
    path = GOLDEN / name
    text = text.rstrip("\n") + "\n"
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    assert path.is_file(), f"tests/golden/{name} is missing; run: pytest --update-golden"
    expected = path.read_text(encoding="utf-8")
    assert text == expected, f"tests/golden/{name} differs; if right, run: pytest --update-golden"
