"""One environment for all ranks of a job: what the launcher sends, what a node adds, what differs. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from trtllm_workers.config.options import LAUNCH_OPTIONS
from trtllm_workers.deploy.shm import EPLB_SHM_NAME
from trtllm_workers.deploy.slurm.records import RankRecord
from trtllm_workers.worker.rank_env import difference, is_secret, rank_variables

# A node's own: SLURM names its devices. And a worker's own: the name of its shared memory.
_PER_RANK = frozenset({"CUDA_VISIBLE_DEVICES", EPLB_SHM_NAME})
# Inside a container these say where the image's own software is.
_OF_THE_IMAGE = frozenset({"LD_LIBRARY_PATH", "PYTHONPATH"})


def to_send(environ: Mapping[str, str], *, in_container: bool) -> dict[str, str]:
    """Return the variables that every rank gets: those all must see alike, and our secrets."""
    ours = {name for one in LAUNCH_OPTIONS if one.secret for name in one.env}
    found = rank_variables(environ) | {name: environ[name] for name in ours if environ.get(name)}
    left_out = _PER_RANK | (_OF_THE_IMAGE if in_container else frozenset())
    return {name: value for name, value in sorted(found.items()) if name not in left_out}


def comparable(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what is compared between ranks; of a secret its hash."""
    return {
        name: hashlib.sha256(value.encode()).hexdigest() if is_secret(name) else value
        for name, value in rank_variables(environ).items()
        if name not in _PER_RANK
    }


def digest(variables: Mapping[str, str]) -> str:
    """Return one hash over variables."""
    return hashlib.sha256(json.dumps(dict(variables), sort_keys=True).encode()).hexdigest()


def changed_on_node(here: Mapping[str, str], sent: Mapping[str, str]) -> tuple[str, ...]:
    """Return what a node adds to the environment, or had otherwise, in words.

    A cluster's prolog may set UCX_TLS, say. What was sent wins; what is only there stays.
    """
    words = []
    for name, value in comparable(here).items():
        if name not in sent:
            words.append(f"{name}={'(not shown)' if is_secret(name) else value} is set by the node")
        elif not is_secret(name) and value != sent[name]:
            words.append(f"{name}={value} of the node is replaced by {sent[name]}")
    return tuple(words)


def disagreement(name: str, ranks: Mapping[int, RankRecord]) -> str:
    """Return what the ranks of one worker see differently, in words; "" when nothing."""
    if len({one.digest for one in ranks.values()}) <= 1:
        return ""
    # difference() speaks of positions; ranks may be missing, so each is named by its node as well.
    everyone = [ranks[rank].variables for rank in sorted(ranks)]
    where = ", ".join(f"rank {rank} is on {ranks[rank].node}" for rank in sorted(ranks))
    return (
        f"the ranks of {name} see different environments, so they would not agree with each other; set "
        f"these in the shell that starts the run, or on no node:\n{difference(everyone)}\n({where})"
    )
