"""Looks at every node of a job before anything is started there, and says what does not fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from trtllm_workers import __version__
from trtllm_workers.deploy.slurm import records
from trtllm_workers.deploy.slurm.on_all import Said, Steps
from trtllm_workers.deploy.slurm.plan import SlurmPlan
from trtllm_workers.errors import ConfigError

_MOST_CLOCK_DIFFERENCE_S = 5.0


async def check_nodes(made: SlurmPlan, steps: Steps, say: Callable[[str], None]) -> None:
    """Run the check on all nodes. Raises ConfigError naming every node that does not fit, and why."""
    limit_s = made.slurm.preflight_timeout_s
    said = await steps.run(made.preflight, limit_s, "preflight")
    folder = made.plan.folder.path
    answers = {
        node: records.read(records.node_path(folder, node), records.NodeRecord)
        for node in made.allocation.nodes
    }
    found = {node: one for node, one in answers.items() if one is not None}
    wrong = [f"{node}: {problem}" for node, one in found.items() for problem in one.problems]
    missing = [node for node in made.allocation.nodes if node not in found]
    if missing:
        wrong.append(_silent(missing, said, limit_s))
    elif said.status != 0 and not wrong:
        wrong.append(f"the check of the nodes failed: {said.last_words()}")
    wrong += _unlike(found)
    if wrong:
        raise ConfigError("\n".join(_grouped(wrong)), param="num_nodes")
    now_s = time.time()
    for node, one in found.items():
        # What was written some seconds ago is older; only a clock in the future is sure to be wrong.
        if one.now_s - now_s > _MOST_CLOCK_DIFFERENCE_S:
            say(
                f"note: the clock of {node} is {one.now_s - now_s:.0f} s ahead of this host's; times in logs "
                "will not fit together"
            )


def _silent(missing: Sequence[str], said: Said, limit_s: float) -> str:
    names = ", ".join(missing[:8]) + (" …" if len(missing) > 8 else "")
    verb = "has" if len(missing) == 1 else "have"
    when = f" within {limit_s:g} s (--preflight-timeout-s)" if said.late else ""
    hint = f": {said.hint}" if said.hint else ""
    return f"{names} {verb} not answered the check{when}{hint}\n{said.last_words()}"


def _unlike(found: Mapping[str, records.NodeRecord]) -> list[str]:
    """Return what is not the same on all nodes."""
    wrong = []
    for node, record in found.items():
        if record.version != __version__:
            wrong.append(
                f"{node}: trtllm-launch {record.version} is there, and {__version__} here; install the same, or "
                "build the image anew"
            )
    pythons = {one.python.rpartition(".")[0] for one in found.values()}
    if len(pythons) > 1:
        shown = ", ".join(f"{node} {one.python}" for node, one in list(found.items())[:8])
        wrong.append(f"the nodes have different Pythons: {shown}")
    return wrong


def _grouped(lines: Sequence[str]) -> list[str]:
    """Return lines ``NODE: problem`` with the nodes of one problem together."""
    by_problem: dict[str, list[str]] = {}
    for line in lines:
        node, colon, problem = line.partition(": ")
        if colon and " " not in node:
            by_problem.setdefault(problem, []).append(node)
        else:
            by_problem.setdefault(line, [])
    return [
        f"{', '.join(nodes[:8])}{' …' if len(nodes) > 8 else ''}: {problem}" if nodes else problem
        for problem, nodes in by_problem.items()
    ]
