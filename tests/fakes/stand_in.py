"""Puts the stand-in for TensorRT-LLM where ``import tensorrt_llm`` finds it, and takes it away again."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent / "trtllm"


@contextlib.contextmanager
def tensorrt_llm_stand_in() -> Iterator[None]:
    """Make ``tensorrt_llm`` the stand-in; other tests must not believe that it is installed."""
    _forget()
    sys.path.insert(0, str(FOLDER))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        _forget()


def _forget() -> None:
    for name in [one for one in sys.modules if one.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]
