"""Is this path a Hugging Face model folder, and what is the model called? Reads no weights."""

from __future__ import annotations

import re
from pathlib import Path

from trtllm_workers.config.values import shown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES_SHOWN = 5


def model_folder_problem(path: Path, hub_cache: Path | None = None) -> str | None:
    """Return what is wrong with a model path as a full message, or None when it will do.

    Looked for: a folder holding ``config.json``. ``hub_cache`` is searched for a copy when the
    path is a Hub id, so that the message can name it.
    """
    try:
        if (path / "config.json").is_file():
            return None
        if path.is_dir():
            return _not_a_model(path)
        if path.exists():
            return f"{shown(path)} is a file; give the folder that holds config.json"
    except OSError as error:  # no permission, or a name longer than the file system allows
        return f"{shown(path)} cannot be read: {error.strerror}"
    if _HUB_ID.fullmatch(str(path)):
        return _looks_like_hub_id(str(path), hub_cache)
    return f"there is no folder {shown(path)} (looked for {shown(path / 'config.json')})"


def served_name(path: Path) -> str:
    """Return the name a model gets from its path: the last folder, or the Hub id in a Hub cache."""
    path = path.absolute() if path.name else path.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name or "model"


def _not_a_model(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    held = ", ".join(names[:_FILES_SHOWN]) + (", …" if len(names) > _FILES_SHOWN else "")
    return (
        f"{shown(path)} is no Hugging Face model folder: it has no config.json "
        f"({'it holds ' + held if names else 'it is empty'})"
    )


def _looks_like_hub_id(hub_id: str, hub_cache: Path | None) -> str:
    text = f"there is no folder '{hub_id}'; it looks like a Hugging Face Hub id, and the launcher downloads nothing"
    if hub_cache is not None:
        snapshots = hub_cache / f"models--{hub_id.replace('/', '--')}" / "snapshots"
        copies = sorted(snapshots.glob("*/config.json"), key=lambda file: file.stat().st_mtime)
        if copies:
            return f"{text}. A copy is on this machine: --model-path {copies[-1].parent}"
    folder = hub_id.rpartition("/")[2]
    return (
        f"{text}. Get it with: hf download {hub_id} --local-dir ./{folder}, "
        f"then give --model-path ./{folder}"
    )
