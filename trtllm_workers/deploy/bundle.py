"""One archive of a run for whoever helps: what it was told, saw, wrote and died of; without secrets.

Every paper passes through the redactor on its way in, also those that were written without secrets: a
bundle leaves the house. The same papers make the same bytes: order, owners and times are fixed.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from trtllm_workers.deploy import audit
from trtllm_workers.deploy.first_error import Death, as_text
from trtllm_workers.deploy.history import first_of, head_and_tail, log_texts, redactor_of
from trtllm_workers.deploy.resolved import version
from trtllm_workers.deploy.story import Story
from trtllm_workers.errors import ConfigError
from trtllm_workers.observe.redact import Redactor, anonymous

_MAX_LOGS_BYTES = 16 << 20
_HEAD_BYTES, _TAIL_BYTES = 256 << 10, 1 << 20
_LARGEST_JSON = 1 << 20
_MAX_CONFIG_BYTES = 256 << 10
_FIRST = ("README.txt", "first_error.txt")

_ABOUT = {
    "README.txt": "this text",
    "first_error.txt": "what the first process or rank to fail said first about it",
    "resolved.json": "every setting with its source, engine configs with file:line, versions, commands",
    "run.json": "who was started: pids, ports, state (the run was alive)",
    "ended.json": "how the run ended, and which transports were in use",
    "pairs.json": "which transports move KV blocks between which workers",
    "env-audit.txt": "environment, libraries, networks and limits of all ranks side by side",
    "facts/": "the same for each process and rank, as it saw it",
    "status/": "the last step that each process reported",
    "configs/": "the engine config files that were named",
    "logs/": "beginning and end of each process's log",
}


def papers_of(
    story: Story, redactor: Redactor, hide: Callable[[str], str] = lambda text: text
) -> dict[str, bytes]:
    """Return the papers of a run by name, without secrets; ``hide`` is applied to every text last."""
    texts: dict[str, str] = {}
    logs = _logs(story)
    texts["first_error.txt"] = _first_error(story, logs)
    texts |= {f"logs/{name}.log": redactor.text(text) for name, text in logs.items()}
    texts |= _jsons(story, redactor)
    if story.facts:
        named = audit.names_of([(story.run_id, story.facts)])
        texts["env-audit.txt"] = audit.as_text(audit.audit(named)) + "\n"
    texts |= {
        name: redactor.text(text) for name, text in texts.items() if not name.endswith(".json")
    }
    texts |= {name: redactor.text(text) for name, text in _configs(story).items()}
    texts["README.txt"] = _readme(story, texts)
    return {name: hide(text).encode() for name, text in texts.items()}


def write_bundle(story: Story, path: Path, environ: Mapping[str, str], *, hide_user: bool) -> None:
    """Write the archive, readable by its owner alone. Raises ConfigError when it cannot be written."""
    if story.folder is None:
        raise ConfigError("that run is in a bundle already", param="run_id")
    redactor = redactor_of(story.folder, story.record)
    user, home = environ.get("USER", ""), environ.get("HOME", "")
    papers = papers_of(
        story,
        redactor,
        (lambda text: anonymous(text, user, home)) if hide_user else (lambda text: text),
    )
    packed = pack(papers, f"trtllm-launch-{story.run_id}", int(_when(story)))
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(packed)
        draft.replace(path)
    except OSError as wrong:
        with suppress(OSError):
            draft.unlink()
        raise ConfigError(
            f"cannot write {path}: {wrong.strerror or wrong}; choose another place with -o",
            param="output",
        ) from wrong


def pack(papers: Mapping[str, bytes], folder: str, mtime_s: int) -> bytes:
    """Return a tar.gz of papers under one folder: README and first error first, then by name."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in sorted(papers, key=lambda one: (_place(one), one)):
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mtime, member.mode = len(papers[name]), mtime_s, 0o600
            archive.addfile(member, io.BytesIO(papers[name]))
    return buffer.getvalue()


def _place(name: str) -> int:
    return _FIRST.index(name) if name in _FIRST else len(_FIRST)


def _when(story: Story) -> float:
    if story.ended is not None:
        return story.ended.started_at_s
    return story.record.started_at_s if story.record else 0.0


def _logs(story: Story) -> dict[str, str]:
    """Return the logs of a run: from where it keeps them, or what its history kept."""
    found: dict[str, str] = {}
    if story.record is not None:
        found = log_texts(story.record, _MAX_LOGS_BYTES)
    if not found and story.folder is not None:
        paths = sorted((story.folder / "logs").glob("*.log"))
        share = _MAX_LOGS_BYTES // max(1, len(paths))
        for path in paths:
            text = head_and_tail(path, min(_HEAD_BYTES, share // 4), min(_TAIL_BYTES, share // 2))
            if text is not None:
                found[path.stem] = text
    return found


def _first_error(story: Story, logs: Mapping[str, str]) -> str:
    ended = story.ended
    if story.folder is not None and not logs:
        with suppress(OSError):
            return (story.folder / "first_error.txt").read_text(encoding="utf-8")
    death = Death(ended.process, ended.rank, ended.how) if ended and ended.process else None
    text = as_text(first_of(logs, _when(story), death))
    if ended is not None and ended.report:
        text += f"\nwhat the launcher said at the end:\n{ended.report}\n"
    return text


def _jsons(story: Story, redactor: Redactor) -> dict[str, str]:
    """Return the JSON papers, parsed and written again: a replaced value must not break them."""
    assert story.folder is not None
    root = story.folder
    paths = [root / "resolved.json", root / "run.json", root / "ended.json"]
    paths += [*sorted((root / "facts").glob("*.json")), *sorted((root / "status").glob("*.json"))]
    found = {}
    for path in paths:
        try:
            if path.is_symlink() or path.stat().st_size > _LARGEST_JSON:
                continue
            value = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        cleaned = redactor.value("", value)
        found[str(path.relative_to(root))] = (
            json.dumps(cleaned, indent=1, ensure_ascii=False) + "\n"
        )
    if story.pairs and story.ended is None:
        pairs = msgspec.json.format(msgspec.json.encode(story.pairs), indent=1).decode()
        found["pairs.json"] = redactor.text(pairs) + "\n"
    return found


def _configs(story: Story) -> dict[str, str]:
    """Return the engine config files that the run was given, where they still are."""
    found: dict[str, str] = {}
    settings = story.resolved.settings if story.resolved else {}
    for name, setting in sorted(settings.items()):
        if name.endswith("engine_config") and isinstance(setting.value, str):
            text = head_and_tail(Path(setting.value), _MAX_CONFIG_BYTES, 0)
            if text is not None:
                source = f"# {setting.value}, as it was when the bundle was made\n"
                found[f"configs/{name}.yaml"] = source + text
    return found


def _readme(story: Story, texts: Mapping[str, str]) -> str:
    lines = [
        f"{story.in_words}, packed by trtllm-launch {version()}",
        "",
        "Secrets have been taken out by name, by value and by look. Look through it before you pass it on:",
        "prompts may stand in logs, and no program knows every secret.",
        "",
    ]
    lines += [
        f"{name:<16} {about}"
        for name, about in _ABOUT.items()
        if name == "README.txt" or _has(texts, name)
    ]
    lines += ["", f"compare it with another run: trtllm-launch diff FILE.tar.gz {story.run_id}", ""]
    return "\n".join(lines)


def _has(names: Sequence[str] | Mapping[str, str], name: str) -> bool:
    return any(one == name or (name.endswith("/") and one.startswith(name)) for one in names)
