"""What changed between two runs: settings, engine configs, variables, versions, transports, hosts. Pure.

Names that every run has of its own (its id, its folder, its ports, its rank numbers) are no change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from trtllm_workers.config.engine_config import shown_value
from trtllm_workers.config.tables import table
from trtllm_workers.deploy.audit import is_of_a_rank
from trtllm_workers.deploy.resolved import Resolved, Sourced
from trtllm_workers.deploy.story import Story
from trtllm_workers.observe.facts import Facts

ABSENT = "–"
_OURS = "trtllm-launch"
_SECTIONS = ("settings", "engine config", "environment", "versions", "transports", "hosts")


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is different. ``where`` is a role or processes, "" for all; sources where known."""

    section: str
    name: str
    before: str
    after: str
    where: str = ""
    before_source: str = ""
    after_source: str = ""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two runs and what changed from the first to the second; ``unknown`` is what could not be compared."""

    run_a: str
    run_b: str
    changes: list[Change]
    unknown: list[str]


def compare(a: Story, b: Story) -> Comparison:
    """Return what changed from ``a`` to ``b``."""
    changes: list[Change] = []
    unknown: list[str] = []
    if a.resolved is not None and b.resolved is not None:
        changes += _told(a.resolved, b.resolved)
    else:
        lacking = " and ".join(one.run_id for one in (a, b) if one.resolved is None)
        unknown.append(f"settings, engine configs, versions: {lacking} kept no resolved.json")
    if a.facts and b.facts:
        changes += _seen(a.facts, b.facts)
    else:
        if a.resolved is not None and b.resolved is not None:
            changes += _pairs(
                "versions", _packages(a.resolved.packages), _packages(b.resolved.packages)
            )
        lacking = " and ".join(one.run_id for one in (a, b) if not one.facts)
        unknown.append(f"variables, libraries, hosts: {lacking} kept no facts")
    changes += _transports(a, b)
    changes.sort(key=lambda one: _SECTIONS.index(one.section))
    return Comparison(run_a=a.run_id, run_b=b.run_id, changes=changes, unknown=unknown)


def as_text(found: Comparison) -> str:
    """Return a comparison for people."""
    lines = [f"A is run {found.run_a}, B is run {found.run_b}"]
    for section in _SECTIONS:
        mine = [one for one in found.changes if one.section == section]
        if mine:
            rows = [
                (
                    f"  {one.name}" + (f" ({one.where})" if one.where else ""),
                    _with_source(one.before, one.before_source),
                    _with_source(one.after, one.after_source),
                )
                for one in mine
            ]
            lines += ["", table((section, "A", "B"), rows)]
    if not found.changes:
        lines += ["", "nothing changed"]
    lines += [f"not compared: {one}" for one in found.unknown]
    return "\n".join(lines)


def _with_source(value: str, source: str) -> str:
    return f"{value}  [{source}]" if source else value


def _told(a: Resolved, b: Resolved) -> Iterator[Change]:
    yield from _sourced("settings", "", a.settings, b.settings)
    for role in sorted({*a.engine_configs, *b.engine_configs}):
        before, after = a.engine_configs.get(role), b.engine_configs.get(role)
        if before is None or after is None:
            yield Change(
                section="engine config",
                name="role",
                where=role,
                before=before.engine if before else ABSENT,
                after=after.engine if after else ABSENT,
            )
        else:
            yield from _sourced("engine config", role, before.settings, after.settings)
    yield from _pairs("versions", {_OURS: a.version}, {_OURS: b.version})


def _sourced(
    section: str, where: str, a: Mapping[str, Sourced], b: Mapping[str, Sourced]
) -> Iterator[Change]:
    for name in sorted({*a, *b}):
        before, after = a.get(name), b.get(name)
        if before is None or after is None or before.value != after.value:
            yield Change(
                section=section,
                name=name,
                where=where,
                before=_shown(before.value) if before else ABSENT,
                after=_shown(after.value) if after else ABSENT,
                before_source=before.source if before else "",
                after_source=after.source if after else "",
            )


def _pairs(
    section: str, a: Mapping[str, str], b: Mapping[str, str], where: str = ""
) -> Iterator[Change]:
    for name in sorted({*a, *b}):
        if a.get(name) != b.get(name):
            before, after = a.get(name, ABSENT), b.get(name, ABSENT)
            yield Change(section=section, name=name, where=where, before=before, after=after)


def _seen(a: Sequence[Facts], b: Sequence[Facts]) -> Iterator[Change]:
    before, after = {one.who: one for one in a}, {one.who: one for one in b}
    both = [who for who in before if who in after]
    yield from _by_process("environment", before, after, both, _environment)
    yield from _by_process("versions", before, after, both, _versions)
    gone = ", ".join(sorted({*before} - {*after}))
    new = ", ".join(sorted({*after} - {*before}))
    if gone or new:
        yield Change(section="hosts", name="processes", before=gone or ABSENT, after=new or ABSENT)
    yield from _pairs("hosts", {"hosts": _hosts(a)}, {"hosts": _hosts(b)})
    yield from _by_process("hosts", before, after, both, _host)


def _by_process(
    section: str,
    before: Mapping[str, Facts],
    after: Mapping[str, Facts],
    both: Sequence[str],
    read: Callable[[Facts], Mapping[str, str]],
) -> Iterator[Change]:
    """Yield what changed, processes with the same change together."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for who in both:
        for change in _pairs(section, read(before[who]), read(after[who])):
            found.setdefault((change.name, change.before, change.after), []).append(who)
    for (name, old, new), changed in sorted(found.items()):
        where = "" if len(changed) == len(both) else ", ".join(changed)
        yield Change(section=section, name=name, where=where, before=old, after=new)


def _environment(one: Facts) -> dict[str, str]:
    return {
        name: value
        for name, value in one.environment.items()
        if not is_of_a_rank(name, also_devices=False)
    }


def _versions(one: Facts) -> dict[str, str]:
    libraries: dict[str, list[str]] = {}
    for library in one.libraries:
        libraries.setdefault(library.name, []).append(library.path)
    loaded = {name: " and ".join(paths) for name, paths in libraries.items()}
    return {"python": one.python, **_packages(one.packages), **loaded}


def _packages(versions: Mapping[str, str]) -> dict[str, str]:
    return {name: version for name, version in versions.items() if name != _OURS}


def _host(one: Facts) -> dict[str, str]:
    return {
        "kernel": one.kernel,
        "CPUs": str(one.num_cpus),
        "GPUs": str(len(one.gpus)),
        "RDMA ports": ", ".join(one.rdma_devices) or "none",
        "advertised on": one.nic or ABSENT,
        "/dev/shm": f"{one.shm_bytes / 2**30:.1f} GiB",
        **{
            f"limit {name}": "unlimited" if limit.soft < 0 else str(limit.soft)
            for name, limit in one.limits.items()
        },
    }


def _hosts(facts: Sequence[Facts]) -> str:
    return ", ".join(sorted({one.host for one in facts}))


def _transports(a: Story, b: Story) -> Iterator[Change]:
    def asked(story: Story) -> dict[str, str]:
        return dict(story.resolved.transports) if story.resolved else {}

    def used(story: Story) -> dict[str, str]:
        return {
            f"{one.decode} from {one.prefill.partition('@')[0]}": f"{one.transport} over {one.wire or '?'}"
            for one in story.pairs
        }

    if a.resolved is not None and b.resolved is not None:
        yield from _pairs("transports", asked(a), asked(b))
    before, after = used(a), used(b)
    # A run that never came to a pair shows none; that is not another transport.
    both = set(before) & set(after)
    yield from _pairs(
        "transports", {one: before[one] for one in both}, {one: after[one] for one in both}
    )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or ABSENT
    return ABSENT if value is None else shown_value(value)
