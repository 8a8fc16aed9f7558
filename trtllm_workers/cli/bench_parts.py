"""What the verbs of ``trtllm-launch bench`` share: a workload's options, the event loop, 'up' commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from trtllm_workers.errors import ConfigError

if TYPE_CHECKING:
    from trtllm_workers.bench.started import Split
    from trtllm_workers.bench.workload import Workload

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

_COUNT = click.IntRange(1)


class DefaultGroup(click.Group):
    """A group that takes options without a verb as those of ``run``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            known = ", ".join(self.commands)
            raise ConfigError(f"bench has no '{args[0]}'; there are: {known}")
        return super().resolve_command(ctx, args)


def workload_options(isl: int, osl: int) -> Callable[[F], F]:
    """Decorate a command with the options of a workload."""
    options = (
        click.option(
            "--isl",
            "--input-sequence-length",
            type=_COUNT,
            default=isl,
            metavar="TOKENS",
            help="Prompt tokens, as the server counts them.",
        ),
        click.option(
            "--osl",
            "--output-sequence-length",
            type=_COUNT,
            default=osl,
            metavar="TOKENS",
            help="Answer tokens.",
        ),
        click.option(
            "--shared-prefix",
            type=click.IntRange(0),
            default=0,
            metavar="TOKENS",
            help="Tokens that all prompts begin with.",
        ),
        click.option(
            "--no-ignore-eos", is_flag=True, help="Let answers end where the model ends them."
        ),
        click.option(
            "--seed",
            type=click.IntRange(0),
            metavar="N",
            default=100,
            help="Of prompts and times of arrival.",
        ),
        click.option(
            "--tokenizer",
            type=click.Path(exists=True, path_type=Path),
            help="Folder with the model's tokenizer.json; else the server is asked.",
        ),
        click.option(
            "--timeout-s",
            type=click.FloatRange(0.1),
            default=600.0,
            metavar="SECONDS",
            help="A request that takes longer has failed.",
        ),
        click.option("--model", help="Name in /v1/models; not needed when there is one."),
    )

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class Up:
    """Commands that start deployments which end with this process, however it ends."""

    def __init__(self, engine: str, more: tuple[str, ...], run_dir: Path) -> None:
        self._engine = engine
        self._more = more
        self._run_dir = run_dir.absolute()

    def command(self, split: Split) -> list[str]:
        """Return the command of a split."""
        words = [sys.executable, "-m", "trtllm_workers.cli.main", "up", "--engine", self._engine]
        words += ["--http-port", "0", "--run-dir", str(self._run_dir), "--log-level", "warning"]
        return [*words, *split.options(), *self._more]

    def clear(self) -> None:
        """Remove the folder of runs, which is empty unless a run kept the logs of a death."""
        with suppress(OSError):
            self._run_dir.rmdir()

    def environ(self) -> dict[str, str]:
        """Return its environment, which names this process as the one to end with."""
        from trtllm_workers.config.env import child_environment
        from trtllm_workers.deploy.parent import PARENT_PID

        return child_environment({PARENT_PID: str(os.getpid())})


def workload_of(values: dict[str, Any]) -> Workload:
    """Return the workload that options describe."""
    from trtllm_workers.bench.workload import Workload

    return Workload(
        isl=values["isl"],
        osl=values["osl"],
        shared_prefix=values["shared_prefix"],
        ignore_eos=not values["no_ignore_eos"],
        seed=values["seed"],
    )


def say(line: str) -> None:
    """Print a line at once: a measurement takes minutes."""
    print(line, flush=True)


def run_until_ended(main: Coroutine[Any, Any, T]) -> T:
    """Run to the end on uvloop where it is installed; SIGTERM ends it like Ctrl-C, with all it started."""
    import asyncio
    import signal

    async def interruptible() -> T:
        task = asyncio.current_task()
        assert task is not None, "a coroutine that runs is a task's"
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await main

    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(interruptible())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
