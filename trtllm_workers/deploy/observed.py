"""What can be seen of a live run's processes from outside: libraries now, ranks that wrote nothing.

TensorRT-LLM spawns ranks that never run our command line, and a rank writes its facts before its engine
has loaded. Where processes are of this host, /proc tells both.
"""

from __future__ import annotations

import msgspec

from trtllm_workers.deploy import proc
from trtllm_workers.deploy.run import PROCESS, RUN_ID, members_of, rank_of
from trtllm_workers.deploy.story import Story
from trtllm_workers.observe.facts import Facts, collect, in_order, libraries_of


def with_live(story: Story) -> list[Facts]:
    """Return a story's facts, completed by what its live processes of this host show."""
    facts = list(story.facts)
    record = story.record
    if record is None or not record.of_this_boot:
        return facts
    boot = proc.boot_id()
    fresh = [_refreshed(one, record.run_id) if one.boot_id == boot else one for one in facts]
    known = {(one.process, one.rank) for one in fresh}
    roles = {one.name: one.role for one in record.processes}
    for member in sorted(members_of(record.run_id), key=lambda one: one.start_ticks):
        tags = proc.variables(member.pid)
        name, rank = tags.get(PROCESS, ""), rank_of(tags)
        if rank is None or name not in roles or (name, rank) in known:
            continue
        libraries = libraries_of(member.pid)
        if not libraries:  # a shell or a helper between mpirun and the rank
            continue
        known.add((name, rank))
        seen = collect(name, tags, role=roles[name], rank=rank, moment="ready")
        # Versions, limits and CPUs would be those of this command.
        fresh.append(
            msgspec.structs.replace(
                seen, pid=member.pid, libraries=libraries, limits={}, python="", packages={}
            )
        )
    return in_order(fresh)


def _refreshed(one: Facts, run_id: str) -> Facts:
    # Another process may have the pid by now, or the facts come from a container with pids of its own.
    if proc.variables(one.pid).get(RUN_ID) != run_id:
        return one
    return msgspec.structs.replace(one, libraries=libraries_of(one.pid) or one.libraries)
