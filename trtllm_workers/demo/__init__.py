"""The demo model: where its files lie and what it is called. Knows no tokenizer and no engine."""

from __future__ import annotations

from pathlib import Path

DEMO_MODEL_NAME = "demo"


def demo_model_path() -> Path:
    """Return the directory of the demo model, in the Hugging Face layout."""
    return Path(__file__).resolve().parent / "model"
