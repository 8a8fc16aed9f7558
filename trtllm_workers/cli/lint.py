"""``trtllm-launch lint``: engine configs checked as TensorRT-LLM would take them, in no time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trtllm_workers.cli.options import GroupedCommand
from trtllm_workers.errors import ConfigError

if TYPE_CHECKING:
    from trtllm_workers.lint.problem import Problem
    from trtllm_workers.types import Role

_GIB = 1 << 30


@click.command("lint", cls=GroupedCommand)
@click.argument("files", nargs=-1, metavar="[ROLE=]FILE...")
@click.option("--fix", is_flag=True, help="Mend what can be mended: old keys, spelling, case.")
@click.option("--trtllm", metavar="VERSION", help="TensorRT-LLM's version (the newest known one).")
@click.option("--gpus-per-node", type=click.IntRange(1), metavar="N", help="GPUs of each node.")
@click.option("--isl", type=click.IntRange(1), metavar="TOKENS", help="Longest input.")
@click.option("--osl", type=click.IntRange(1), metavar="TOKENS", help="Longest output.")
@click.option(
    "--router",
    type=click.Choice(["random", "round_robin", "least_loaded", "kv"]),
    help="Router mode; kv needs KV events.",
)
@click.option("--model-path", metavar="DIR", help="Folder with config.json, for heads and memory.")
@click.option("--gpu-memory-gib", type=float, metavar="GIB", help="Memory of one GPU.")
@click.option("--kv-transport", type=click.Choice(["ucx", "nixl"]), help="As given to 'up'.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "github"]),
    default="text",
    help="How findings are printed.",
)
@click.option("--strict", is_flag=True, help="Take warnings for errors.")
def command(files: tuple[str, ...], fix: bool, form: str, strict: bool, **values: Any) -> int:
    """Check engine configs for TensorRT-LLM: keys, roles, pairs, memory.

    FILE's role is told by a prefix (prefill=a.yaml), else by a word in its name. Without files the
    configs that come with the project are checked. Ends with 0, with 1 for warnings, 2 for errors.
    """
    from trtllm_workers.lint.formats import as_github, as_json, as_text, exit_code

    deployments = _deployments(files)
    if fix:
        for path in dict.fromkeys(path for one in deployments for _, path in one):
            _fix(path, _version(values["trtllm"]))
    problems: list[Problem] = []
    for deployment in deployments:
        problems += _lint(deployment, values)
    num_files = sum(map(len, deployments))
    if form == "json":
        print(as_json(problems))
    elif form == "github":
        if problems:
            print(as_github(problems))
    else:
        print(as_text(problems, num_files))
    return exit_code(problems, strict=strict)


def _lint(deployment: list[tuple[Role, Path]], values: dict[str, Any]) -> list[Problem]:
    from trtllm_workers.config.env import environment
    from trtllm_workers.lint.context import LintContext
    from trtllm_workers.lint.run import lint_files

    memory = values["gpu_memory_gib"]
    model = values["model_path"]
    context = LintContext(
        gpus_per_node=values["gpus_per_node"],
        gpu_memory_bytes=round(memory * _GIB) if memory else None,
        isl=values["isl"],
        osl=values["osl"],
        router=values["router"],
        model_path=Path(model) if model else None,
        model_name=Path(model).name if model else "",
        kv_transport=values["kv_transport"],
        environ=environment(),
    )
    return lint_files(deployment, context, version=_version(values["trtllm"]))[1]


def _version(given: str | None) -> str:
    from trtllm_workers.config.schema import described_versions

    versions = described_versions()
    if given is None:
        return versions[-1]
    if given not in versions:
        raise ConfigError(
            f"--trtllm: the keys of TensorRT-LLM {given} are not known here; known: {', '.join(versions)}",
            param="trtllm",
        )
    return given


def _fix(path: Path, version: str) -> None:
    from trtllm_workers.lint.fix import fix_file

    fixed = fix_file(path, version=version)
    for change in fixed:
        print(f"{path}: {change}", file=sys.stderr)


def _deployments(files: tuple[str, ...]) -> list[list[tuple[Role, Path]]]:
    """Return the files by deployment: those given are one, the shipped ones one per folder."""
    from trtllm_workers.config.shipped import shipped_engine_configs
    from trtllm_workers.lint.roles_of_files import role_and_path, role_of

    if files:
        return [[role_and_path(one) for one in files]]
    folders: dict[Path, list[tuple[Role, Path]]] = {}
    for path in shipped_engine_configs():
        folders.setdefault(path.parent, []).append((role_of(path), path))
    return list(folders.values())
