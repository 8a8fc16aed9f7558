"""SLURM's commands as programs on PATH, which answer as real clusters do. Holds no test."""

from __future__ import annotations

import getpass
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

BANNER = """\
**********************************************
*  Welcome to Example HPC | 12 | up | 0/0/0/0 *
*  scratch is purged on 2026-12-01            *
**********************************************
gpu*|up|99|infinite"""
MODULES = "Lmod: loading slurm/23.11.10 \nslurm_load_jobs: warning: cached answer"

# A cluster with a database and PMIx; what sinfo prints with the format this project asks for.
PARTITIONS = """\
@trtllm@gpu|gpu*|up|2/5/1/8|2-00:00:00|gpu:h100:8(S:0-1)|128
@trtllm@gpu|gpu*|up|0/2/0/2|2-00:00:00|gpu:h100:4(S:0-1),nvme:1|96+
@trtllm@cpu|cpu|up|0/40/0/40|infinite|(null)|64"""
CONFIG = """\
Configuration data as of 2026-03-01T12:00:00
AccountingStorageEnforce = associations,limits
ClusterName             = hpc
MpiDefault              = pmix
PluginDir               = (null)
SLURM_VERSION           = 23.11.10"""
MPI_TYPES = """\
MPI plugin types are...
\tnone
\tcray_shasta
\tpmi2
\tpmix
specific pmix plugin versions available: pmix_v4,pmix_v5"""
# Up to 21.08 on stderr.
OLD_MPI_TYPES = """\
srun: MPI types are...
srun: cray_shasta
srun: none
srun: pmi2
srun: pmix_v3
srun: pmix"""
HELP = "Usage: srun [OPTIONS(0)...\n      --container=PATH        Path to OCI container bundle\n"
PYXIS_HELP = HELP + "\nOptions provided by plugins:\n      --container-image=[USER@][REGISTRY#]\n"

NO_GRES = "sbatch: error: Invalid generic resource (gres) specification"
NO_OPTION = "sbatch: unrecognized option '--segment=1'\nTry \"sbatch --help\" for more information"
NO_PYXIS = "sbatch: unrecognized option '--container-image=docker://trtllm-launch'"
NO_ACCOUNT = "allocation failure: Invalid account or account/partition combination specified"
NO_DATABASE = (
    "You are not running a supported accounting_storage plugin\n"
    "Only 'accounting_storage/slurmdbd' is supported."
)


@dataclass
class FakeCluster:
    """What the programs answer. ``refuses`` and ``wants`` map a flag's beginning to sbatch's words."""

    accounts: tuple[str, ...] = ("astro",)
    default_account: str = "astro"
    partitions: str = PARTITIONS
    config: str = CONFIG
    mpi_stdout: str = MPI_TYPES
    mpi_stderr: str = ""
    help: str = HELP
    has_sacctmgr: bool = True
    sacctmgr_complaint: str = ""
    banner: str = ""
    refuses: Mapping[str, str] = field(default_factory=dict)
    wants: Mapping[str, str] = field(default_factory=dict)
    other_cluster: str = ""

    def install(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Put the programs on PATH; return where sbatch writes the words of each call."""
        programs = folder / "bin"
        programs.mkdir()
        calls = folder / "sbatch-calls"
        calls.touch()
        user = getpass.getuser()
        rows = [f"{user}|{account}|hpc" for account in self.accounts]
        rows += [f"{user}|elsewhere|{self.other_cluster}"] if self.other_cluster else []
        scripts = {
            "sinfo": _says(self.partitions),
            "scontrol": _says(self.config),
            "srun": f'if [ "$1" = --help ]; then\n{_says(self.help)}\nelse\n'
            f"{_says(self.mpi_stdout)}\n{_says(self.mpi_stderr)} >&2\nfi",
            "sbatch": self._sbatch(calls),
        }
        if self.sacctmgr_complaint:
            scripts["sacctmgr"] = f"{_says(self.sacctmgr_complaint)} >&2; exit 1"
        elif self.has_sacctmgr:
            assoc, default = _says("\n".join(rows)), _says(f"{user}|{self.default_account}")
            scripts["sacctmgr"] = f'case "$*" in *assoc*) {assoc};; *) {default};; esac'
        greeting = f"{_says(self.banner)}\n{_says(MODULES)} >&2\n" if self.banner else ""
        for name, body in scripts.items():
            program = programs / name
            program.write_text(f"#!/bin/sh\n{greeting}{body}\n")
            program.chmod(0o755)
        monkeypatch.setenv("PATH", str(programs))  # the scripts need only what their shell has
        return calls

    def _sbatch(self, calls: Path) -> str:
        lines = [f'echo "$*" >>{shlex.quote(str(calls))}']
        refuses = dict(self.refuses)
        if self.help != PYXIS_HELP:
            refuses["--container-image="] = NO_PYXIS
        for flag, words in refuses.items():
            lines.append(f'case " $* " in *" {flag}"*) {_says(words)} >&2; exit 1;; esac')
        for flag, words in self.wants.items():
            lines.append(f'case " $* " in *" {flag}"*) ;; *) {_says(words)} >&2; exit 1;; esac')
        start = "sbatch: Job 7 to start at 2026-03-01T12:00:00 using 1 processors on nodes n1"
        return "\n".join([*lines, f"{_says(start)} >&2"])


def _says(text: str) -> str:
    return f"printf '%s\\n' {shlex.quote(text)}" if text else ":"
