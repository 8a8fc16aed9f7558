"""The experts' load balancer (EPLB) of a config: inline, or in a file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trtllm_workers.lint.document import Document


def load_balancer(doc: Document) -> Mapping[str, Any]:
    """Return the load balancer's settings; empty when there is none or its file cannot be read.

    A path is tried as TensorRT-LLM would, from the working directory, and then beside the config. That a
    file is missing is for the reader of the config to say.
    """
    given = doc.get("moe_config.load_balancer")
    if isinstance(given, Mapping):
        return given
    if not isinstance(given, str):
        return {}
    path = Path(given)
    beside = [doc.path.parent / path] if doc.path is not None else []
    for candidate in (path, *beside):
        try:
            content = yaml.safe_load(candidate.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        return content if isinstance(content, Mapping) else {}
    return {}
