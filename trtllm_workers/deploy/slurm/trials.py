"""Finds out which directives a cluster takes, with ``sbatch --test-only``. Submits nothing, ever."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from trtllm_workers.deploy.slurm.command import Answer, RunCommand
from trtllm_workers.deploy.slurm.profile import ACCEPTED, REQUIRED, Verdict

_MAX_ALTERNATIVES: Final = 4  # accounts, or partitions, that are tried one by one
_GPU_FLAGS: Final = ("--gpus-per-node", "--gres")
# No job begins, so these stand for what `slurm run` asks for, not for what a run would need.
_TRIED_TIME: Final = "--time=00:10:00"
_TRIED: Final = (
    "--exclusive",
    "--segment=1",
    "--mem=0",
    "--no-kill",
    "--no-requeue",
    "--qos=normal",
    "--comment=trtllm-launch",
    "--signal=B:TERM@60",
    "--container-image=docker://trtllm-launch",
    _TRIED_TIME,
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the trials are made with. ``given`` is in each of them: what the user decided.

    ``accounts`` and ``partitions`` are those that may be tried when nothing is accepted without, the
    likeliest first.
    """

    num_gpus: int
    given: tuple[str, ...] = ()
    account: str | None = None
    accounts: tuple[str, ...] = ()
    partitions: tuple[str, ...] = ()


@dataclass(slots=True)
class Outcome:
    """What the trials showed. ``complaint`` is what sbatch said when nothing at all was accepted."""

    accepts: dict[str, Verdict] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    complaint: str = ""
    notes: list[str] = field(default_factory=list)


class _Stopped(Exception):
    """SLURM's controller gives no answer; further trials would each wait for their deadline."""


def directive_of(flag: str) -> str:
    """Return a flag without its value."""
    return flag.partition("=")[0]


async def try_directives(run_command: RunCommand, wanted: Wanted) -> Outcome:
    """Return which directives ``sbatch`` accepts, refuses or requires for a job of one node."""
    outcome = Outcome()
    try:
        await _find_required(run_command, wanted, outcome)
        if outcome.complaint:
            return outcome
        await _find_accepted(run_command, wanted, outcome)
    except _Stopped as stopped:
        outcome.notes.append(f"the trials of directives ended early: {stopped}")
        # What was refused shortly before may have been refused for the same reason.
        outcome.accepts = {
            name: verdict for name, verdict in outcome.accepts.items() if verdict.is_usable
        }
        if not outcome.accepts:
            outcome.complaint = str(stopped)
    return outcome


async def _find_required(run_command: RunCommand, wanted: Wanted, outcome: Outcome) -> None:
    """Set ``required`` to the fewest flags with which a job is accepted, or ``complaint``."""
    first = await _try(run_command, wanted.given)
    if first.code == 0:
        return
    for added in _additions(wanted):
        if (await _try(run_command, (*wanted.given, *added))).code == 0:
            outcome.required = added
            outcome.accepts |= {directive_of(flag): REQUIRED for flag in added}
            return
    outcome.complaint = first.complaint


def _additions(wanted: Wanted) -> list[tuple[str, ...]]:
    """Return what may be missing, the fewest flags first, and among those the likeliest."""
    named = {directive_of(flag) for flag in wanted.given}
    accounts = [f"--account={name}" for name in wanted.accounts[:_MAX_ALTERNATIVES]]
    partitions = [f"--partition={name}" for name in wanted.partitions[:_MAX_ALTERNATIVES]]
    kinds = [
        accounts,
        [_TRIED_TIME],
        partitions,
        [f"--gpus-per-node={wanted.num_gpus}", f"--gres=gpu:{wanted.num_gpus}"],
        ["--exclusive"],
    ]
    kinds = [kind for kind in kinds if kind and directive_of(kind[0]) not in named]
    found = [(flag,) for kind in kinds for flag in kind]
    # Two or more at once: of accounts and partitions only the likeliest, of flags for GPUs either.
    few = [kind if directive_of(kind[0]) in _GPU_FLAGS else kind[:1] for kind in kinds]
    return [
        *found,
        *(
            choice
            for count in range(2, len(few) + 1)
            for chosen in itertools.combinations(few, count)
            for choice in itertools.product(*chosen)
        ),
    ]


async def _find_accepted(run_command: RunCommand, wanted: Wanted, outcome: Outcome) -> None:
    base = (*wanted.given, *outcome.required)
    flags = [f"--gpus-per-node={wanted.num_gpus}", f"--gres=gpu:{wanted.num_gpus}", *_TRIED]
    if account := wanted.account or next(iter(wanted.accounts), None):
        flags.append(f"--account={account}")
    for flag in flags:
        name = directive_of(flag)
        if name in outcome.accepts:
            continue
        rivals = _GPU_FLAGS if name in _GPU_FLAGS else (name,)
        others = tuple(one for one in base if directive_of(one) not in rivals)
        answer = await _try(run_command, (*others, flag))
        outcome.accepts[name] = (
            ACCEPTED if answer.code == 0 else Verdict("refused", answer.complaint)
        )
    await _doubt(run_command, base, outcome)


async def _doubt(run_command: RunCommand, base: Sequence[str], outcome: Outcome) -> None:
    """Forget refusals when sbatch now refuses what it accepted at the beginning."""
    refused = {name for name, verdict in outcome.accepts.items() if not verdict.is_usable}
    if not refused:
        return
    again = await _try(run_command, base)
    if again.code:
        outcome.accepts = {
            name: verdict for name, verdict in outcome.accepts.items() if name not in refused
        }
        outcome.notes.append(
            "sbatch accepted a plain job at first and refused it later, so its refusals count for "
            f"nothing: {again.complaint}; probe again"
        )


async def _try(run_command: RunCommand, flags: Sequence[str]) -> Answer:
    answer = await run_command(
        [
            *("sbatch", "--test-only", "--nodes=1", "--job-name=trtllm-launch-probe"),
            *("--output=/dev/null", *flags, "--wrap=true"),
        ]
    )
    if answer.is_missing or answer.is_late:
        raise _Stopped(answer.complaint)
    return answer
