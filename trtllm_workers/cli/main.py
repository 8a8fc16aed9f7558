"""The ``trtllm-launch`` command: finds the subcommand, turns errors into messages and exit codes.

A subcommand's module is imported when it runs, so ``--help`` stays quick whatever they need.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

import click

from trtllm_workers import __version__
from trtllm_workers.config.env import environment
from trtllm_workers.config.spelling import nearest
from trtllm_workers.deploy.parent import PARENT_PID, end_with_parent
from trtllm_workers.errors import EXIT_INTERRUPTED, ConfigError, LaunchError

# Verb → its one line of help; the module of that name in cli/ (with _ for -) holds `command`.
COMMANDS = {
    "up": "Start an ingress and workers here; Ctrl-C ends them.",
    "plan": "Print the commands that 'up' would start.",
    "ingress": "Run one ingress: the OpenAI-compatible HTTP process.",
    "worker": "Run one worker: an engine behind the request plane.",
    "explain": "Say where the router sent requests, and why.",
    "ps": "List runs and their processes.",
    "stop": "End a run, with everything it started.",
    "embed": "Make a file of embeddings of images, to name in requests.",
    "slurm": "Run on SLURM: plan, run, status, stop, probe.",
    "bench": "Measure a deployment, compare measurements, judge disaggregation.",
    "lint": "Check engine configs for TensorRT-LLM: keys, roles, pairs, memory.",
    "doctor": "Check this machine: what is there, what is missing, how to get it.",
    "env-audit": "Compare what the ranks of a run see around them; mark differences.",
    "bundle": "Pack a run into one archive without secrets, to show to others.",
    "diff": "Say what changed between two runs.",
    "gc": "Clear what dead runs left: processes, memory, records, folders.",
}
# Started by 'up' alone; help does not list them.
INTERNAL = ("nats", "etcd")
_EXIT_CONFIGURATION = 2
_DEBUG = "TRTLLM_LAUNCH_DEBUG"


class LazyGroup(click.Group):
    """A group whose commands are modules, imported when asked for by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS and cmd_name not in INTERNAL:
            return None
        module = importlib.import_module(f"trtllm_workers.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = (*COMMANDS, *INTERNAL)
        if args and args[0] not in known and not args[0].startswith("-"):
            near = nearest(args[0], COMMANDS)
            hint = f"did you mean '{near}'?" if near else f"there are: {', '.join(COMMANDS)}"
            raise ConfigError(f"unknown command '{args[0]}'; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=(
        "Exit codes: 0, 2 configuration, 3 a part did not start, 4 a part died, 130 interrupted. "
        "First steps: trtllm-launch doctor, then trtllm-launch up."
    ),
)
@click.version_option(__version__, prog_name="trtllm-launch", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help=f"Show tracebacks of errors.  [env: {_DEBUG}]")
def group(debug: bool) -> None:
    """Serve large language models: one ingress, workers, one command."""
    del debug  # read by main(), which outlives the commands


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; ends with SystemExit."""
    environ = environment()
    if environ.get(PARENT_PID, "").isdigit():
        end_with_parent(int(environ[PARENT_PID]))
    words = list(sys.argv[1:] if args is None else args) or ["--help"]
    debug = bool(environ.get(_DEBUG)) or "--debug" in words[:1]
    raise SystemExit(_run(words, debug))


def _run(words: list[str], debug: bool) -> int:
    try:
        result = group.main(words, prog_name="trtllm-launch", standalone_mode=False)
    except LaunchError as error:
        if debug:
            traceback.print_exc()
        _complain(str(error))
        return error.exit_code
    except click.ClickException as error:
        if debug:
            traceback.print_exc()
        _complain(error.format_message())
        return _EXIT_CONFIGURATION
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `trtllm-launch ps | head`: nobody reads the rest, which is no error of ours.
        with suppress(OSError):
            sys.stdout.close()
        return 0
    return result if isinstance(result, int) else 0


def _complain(message: str) -> None:
    head, *more = message.split("\n")
    lines = [f"trtllm-launch: {head}", *(f"  {line}" for line in more)]
    with suppress(OSError):
        print("\n".join(lines), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
