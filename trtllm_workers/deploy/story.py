"""One run as its papers tell it: live, ended, or packed in a bundle. Reads; asks no process.

What a run keeps lies under the same names in its folder, in its history and in a bundle, so whoever
compares runs need not know which of them it has.
"""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from trtllm_workers.config.spelling import nearest
from trtllm_workers.deploy.history import Ended, PairInUse, pairs_in_use, past_runs, read_ended
from trtllm_workers.deploy.resolved import Resolved, read_resolved
from trtllm_workers.deploy.run import HISTORY, RunFolder, RunRecord
from trtllm_workers.errors import ConfigError
from trtllm_workers.observe.facts import Facts, in_order, read_facts

T = TypeVar("T")

# What one paper of a bundle may hold, and how many there may be: bundles come from other people.
_LARGEST_PAPER = 4 << 20
_MOST_PAPERS = 10_000
_MOST_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Story:
    """The papers of one run. ``folder`` is where they lie, None: in a bundle.

    ``record`` is there while its folder is, ``ended`` once it has ended.
    """

    run_id: str
    folder: Path | None
    resolved: Resolved | None
    facts: tuple[Facts, ...]
    record: RunRecord | None = None
    ended: Ended | None = None
    pairs: tuple[PairInUse, ...] = ()

    @property
    def in_words(self) -> str:
        """The run and how it is: ``run abc123 (failed)``."""
        if self.ended is not None:
            return f"run {self.run_id} ({self.ended.outcome})"
        return f"run {self.run_id} ({self.record.state if self.record else 'of a bundle'})"


def open_story(roots: Sequence[Path], name: str | None) -> Story:
    """Return a run's story: ``name`` is an id (its beginning is enough), a folder or a bundle.

    Without one it is the latest run that has a folder, else the latest that has ended. Runs of other
    hosts count, where they share the run directory. Raises ConfigError.
    """
    if name is not None and ("/" in name or name.endswith((".tar.gz", ".tgz"))):
        path = Path(name).expanduser()
        if path.is_dir():
            return _of_folder(path)
        return _of_bundle(path)
    live, past = _live(roots), past_runs(roots)
    if name is None:
        if live or past:
            return _of_folder((live or past)[0])
        raise ConfigError(
            f"no run is there, and none is remembered in {_listed(roots)}", param="run_id"
        )
    by_id: dict[str, Path] = {}
    for path in (*live, *past):
        by_id.setdefault(path.name, path)
    begun = [known for known in by_id if known.startswith(name)]
    if name in by_id or len(begun) == 1:
        return _of_folder(by_id[name if name in by_id else begun[0]])
    near = nearest(name, by_id)
    known = ", ".join(list(by_id)[:5])
    hint = f"did you mean {near}?" if near else f"there are: {known}" if known else "there is none"
    raise ConfigError(
        f"unknown run '{name}'; {hint} (the last 20 that ended are remembered)", param="run_id"
    )


def _live(roots: Iterable[Path]) -> list[Path]:
    """Return the folders of runs that have a record, the latest first."""
    found: list[tuple[float, Path]] = []
    for root in roots:
        for path in sorted(root.glob("*/run.json")):
            record = RunFolder(path.parent).read()
            if record is not None and path.parent.name != HISTORY:
                found.append((record.started_at_s, path.parent))
    return [path for _, path in sorted(found, reverse=True)]


def _of_folder(path: Path) -> Story:
    folder = RunFolder(path)
    record, ended = folder.read(), read_ended(path)
    story = Story(
        run_id=record.run_id if record else ended.run_id if ended else path.name,
        folder=path,
        resolved=read_resolved(folder.resolved),
        facts=tuple(read_facts(folder.facts)),
        record=record,
        ended=ended,
        pairs=ended.pairs if ended else pairs_in_use(folder),
    )
    if not (story.record or story.ended or story.resolved or story.facts):
        raise ConfigError(f"{path} is no folder of a run", param="run_id")
    return story


def _of_bundle(path: Path) -> Story:
    papers = _papers(path)
    resolved = _decoded(papers.get("resolved.json"), Resolved)
    ended = _decoded(papers.get("ended.json"), Ended)
    record = _decoded(papers.get("run.json"), RunRecord)
    facts = [
        one
        for name, text in papers.items()
        if name.startswith("facts/") and (one := _decoded(text, Facts)) is not None
    ]
    pairs = _decoded(papers.get("pairs.json"), tuple[PairInUse, ...]) or ()
    known = resolved or ended or record
    if known is None:
        raise ConfigError(f"{path} is no bundle of a run", param="run_id")
    return Story(
        run_id=known.run_id,
        folder=None,
        resolved=resolved,
        facts=tuple(in_order(facts)),
        record=record,
        ended=ended,
        pairs=ended.pairs if ended else pairs,
    )


def _papers(path: Path) -> dict[str, bytes]:
    """Return the JSON papers of a bundle by their names without the first folder. Unpacks nothing."""
    found: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(path, "r:gz") as archive:
            for number, member in enumerate(archive):
                total += member.size
                if number >= _MOST_PAPERS or total > _MOST_BYTES:
                    raise ConfigError(f"{path} is larger than a bundle can be", param="run_id")
                name = member.name.partition("/")[2]
                file = archive.extractfile(member) if member.isreg() else None
                if file is not None and name.endswith(".json") and member.size <= _LARGEST_PAPER:
                    found[name] = file.read()
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}", param="run_id") from None
    except (OSError, tarfile.TarError, gzip.BadGzipFile, EOFError) as wrong:
        raise ConfigError(f"{path} cannot be read as a bundle: {wrong}", param="run_id") from wrong
    return found


def _decoded(text: bytes | None, kind: type[T]) -> T | None:
    if text is None:
        return None
    decode: Callable[..., T] = msgspec.json.decode
    try:
        return decode(text, type=kind)
    except msgspec.DecodeError:
        return None


def _listed(roots: Sequence[Path]) -> str:
    return " and ".join(str(root) for root in roots)
