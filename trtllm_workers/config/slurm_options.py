"""The table of options that only ``trtllm-launch slurm`` has: nodes, image, what the cluster wants.

Resolved like the launcher's own: flag over variable over default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trtllm_workers.config.layers import Layers
from trtllm_workers.config.option import Option
from trtllm_workers.config.tables import table
from trtllm_workers.errors import ConfigError


def _nodes(name: str, variable: str, whose: str) -> Option:
    return Option(
        name=name,
        flag=f"--{name.replace('_', '-')}",
        env=(variable,),
        default=None,
        default_text="ranks ÷ GPUs of a node",
        kind=int,
        minimum=1,
        maximum=4096,
        metavar="N",
        help=f"Nodes of each {whose}worker.",
        group="slurm",
    )


def _text(
    name: str, variables: tuple[str, ...], metavar: str, text: str, default_text: str = "none"
) -> Option:
    return Option(
        name=name,
        flag=f"--{name.replace('_', '-')}",
        env=variables,
        default=None,
        default_text=default_text,
        kind=str,
        metavar=metavar,
        help=text,
        group="slurm",
    )


SLURM_OPTIONS: tuple[Option, ...] = (
    _nodes("num_nodes", "NUM_NODES", ""),
    _nodes("num_prefill_nodes", "NUM_PREFILL_NODES", "prefill "),
    _nodes("num_decode_nodes", "NUM_DECODE_NODES", "decode "),
    _text(
        "image",
        ("IMAGE",),
        "IMAGE",
        "Container image of every part (pyxis and enroot); empty: the software on the nodes.",
    ),
    _text(
        "mounts",
        ("MOUNTS",),
        "FROM:TO,…",
        "Folders of the node inside the container; the run's folder is added.",
        "this checkout at /mnt",
    ),
    _text(
        "image_python",
        ("IMAGE_PYTHON",),
        "PROGRAM",
        "Python of the image that has trtllm-launch installed.",
        "python3",
    ),
    Option(
        name="mpi",
        flag="--mpi",
        env=("SLURM_MPI",),
        default="auto",
        kind=str,
        metavar="TYPE",
        help="srun's --mpi for workers of several ranks; auto takes what fits the MPI library.",
        group="slurm",
    ),
    Option(
        name="services",
        flag="--services",
        env=("SERVICES",),
        default="folder",
        kind=str,
        choices=("folder", "etcd"),
        help="Where workers register: in the run's shared folder, or in an etcd on the head node.",
        group="slurm",
    ),
    _text(
        "interface",
        ("NETWORK_INTERFACE",),
        "NAME",
        "Network interface by which processes of different nodes reach each other.",
        "the one of the node's SLURM address",
    ),
    _text(
        "head_node_ip",
        ("HEAD_NODE_IP",),
        "ADDRESS",
        "Address of the head node by which the others and clients reach it.",
        "the one of its SLURM address",
    ),
    _text("job_name", ("JOB_NAME",), "NAME", "Name of the job.", "trtllm-launch"),
    _text(
        "account", ("ACCOUNT",), "NAME", "Account that pays for the job.", "your default account"
    ),
    _text("partition", ("PARTITION",), "NAME", "Partition of the job.", "the cluster's default"),
    _text("qos", ("QOS",), "NAME", "Quality of service of the job."),
    _text(
        "time_limit", ("TIME_LIMIT",), "TIME", "Time limit of the job: minutes, or [D-]HH:MM:SS."
    ),
    _text("reservation", ("RESERVATION",), "NAME", "Reservation that the job runs in."),
    _text("sbatch_args", ("SBATCH_ARGS",), "WORDS", "More words for sbatch, as a shell has them."),
    _text("srun_args", ("SRUN_ARGS",), "WORDS", "More words for every srun, as a shell has them."),
    Option(
        name="preflight_timeout_s",
        flag="--preflight-timeout-s",
        env=("PREFLIGHT_TIMEOUT_S",),
        default=120.0,
        kind=float,
        minimum=1.0,
        maximum=86400.0,
        metavar="SECONDS",
        help="How long the check of all nodes may take; unpacking an image counts.",
        group="slurm",
    ),
)


@dataclass(frozen=True, slots=True)
class SlurmSettings:
    """The values of ``SLURM_OPTIONS``; None: not given. ``sources`` tells where each came from."""

    num_nodes: int | None = None
    num_prefill_nodes: int | None = None
    num_decode_nodes: int | None = None
    image: str | None = None
    mounts: str | None = None
    image_python: str | None = None
    mpi: str = "auto"
    services: str = "folder"
    interface: str | None = None
    head_node_ip: str | None = None
    job_name: str | None = None
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    time_limit: str | None = None
    reservation: str | None = None
    sbatch_args: str | None = None
    srun_args: str | None = None
    preflight_timeout_s: float = 120.0
    sources: Mapping[str, str] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = ()


def resolve_slurm(explicit: Mapping[str, Any], environ: Mapping[str, str]) -> SlurmSettings:
    """Return what flags and variables say. Raises ConfigError naming everything that is wrong."""
    layers = Layers(explicit, environ, SLURM_OPTIONS)
    for name, value in layers.values.items():
        if isinstance(value, str) and ("\n" in value or "\0" in value):
            layers.fail(name, "must be one line")
    if layers.problems:
        raise ConfigError(
            "\n".join(text for _, text in layers.problems), param=layers.problems[0][0]
        )
    return SlurmSettings(**layers.values, sources=layers.sources, warnings=tuple(layers.warnings))


def show_slurm_settings(settings: SlurmSettings) -> str:
    """Return the settings as a table: option, value, source."""
    rows = []
    for option in SLURM_OPTIONS:
        value = getattr(settings, option.name)
        text = option.default_text if value is None else str(value)
        rows.append((option.name, text, settings.sources.get(option.name, "default")))
    return table(("option", "value", "source"), rows)
