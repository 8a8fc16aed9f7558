"""A job's plan as text for people: where everything runs, and the commands. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from trtllm_workers.deploy.slurm.hostlist import compress
from trtllm_workers.deploy.slurm.plan import SlurmPlan


def as_text(made: SlurmPlan, script: str = "") -> str:
    """Return the job ``script`` and every srun, each with what its ranks execute. No secret is in it."""
    plan = made.plan
    head = [
        f"# run {plan.run_id}: {plan.workers_in_words} for model {plan.model}",
        f"# {made.layout.in_words()}; the ingress is on {made.allocation.head}",
        *(
            ()
            if made.allocation.job_id
            else ("# node1, node2, …: names until SLURM has given nodes",)
        ),
        *(f"# note: {note}" for note in plan.notes),
    ]
    parts = ["\n".join(head)]
    if script:
        parts.append(f"# the job: sbatch gets this script\n{script.rstrip()}")
    parts.append(f"# 1. every node is looked at\n{_shell(made.preflight)}")
    for number, process in enumerate(plan.processes, start=2):
        spec = made.specs[process.name]
        ranks = f", {spec.num_ranks} ranks" if spec.num_ranks > 1 else ""
        words = (spec.launcher, *spec.argv) if spec.launcher else spec.argv
        env = "".join(f"{name}={shlex.quote(value)} " for name, value in sorted(spec.env.items()))
        parts.append(
            f"# {number}. {process.name} on {compress(process.nodes)}{ranks}\n"
            f"{_shell(process.argv)}\n# each rank executes:\n#   {env}{shlex.join(words)}"
        )
    return "\n\n".join(parts)


def _shell(words: Sequence[str]) -> str:
    """Return a command, one option per line after the first."""
    lines, command = [words[0]], list(words[1:])
    while command and command[0].startswith("-"):
        lines.append(shlex.quote(command.pop(0)))
    lines.append(shlex.join(command))
    return " \\\n  ".join(line for line in lines if line)
