"""Command-line options made from the settings table, grouped in help. Resolves nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from trtllm_workers.config.options import GROUPS, LAUNCH_OPTIONS, Option
from trtllm_workers.config.spelling import nearest
from trtllm_workers.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

_TITLES = {
    "model": "Model",
    "engine": "Engine",
    "ingress": "Ingress",
    "workers": "Workers",
    "disaggregation": "Disaggregation",
    "images": "Images",
    "router": "Router",
    "planes": "Planes",
    "slurm": "SLURM",
    "logs": "Runs and logs",
    "": "This command",
}
_METAVARS: dict[type, str] = {int: "N", float: "NUMBER", str: "TEXT"}


class TableOption(click.Option):
    """An option of the table: its text is passed on as typed, ``config/`` checks it."""

    def __init__(self, *args: Any, entry: Option, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.entry = entry

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return help_row(self.entry)


class GroupedCommand(click.Command):
    """A command whose help shows options by group, and whose errors name the nearest option."""

    def __init__(self, *args: Any, variables: Sequence[Option] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The group says so too; a command that is called without it must not differ.
        self.context_settings.setdefault("help_option_names", ["-h", "--help"])
        self.variables: list[Option] = list(variables)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as unknown:
            known = [name for param in self.get_params(ctx) for name in param.opts]
            near = nearest(unknown.option_name, known)
            hint = f"; did you mean {near}?" if near else f"; see: {ctx.command_path} --help"
            raise ConfigError(f"unknown option {unknown.option_name}{hint}") from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in ("", *GROUPS)}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and not isinstance(param, click.Argument):
                group = param.entry.group if isinstance(param, TableOption) else ""
                rows[group].append(record)
        for entry in self.variables:
            rows[entry.group].append(help_row(entry))
        for group in (*GROUPS, ""):
            if rows[group]:
                with formatter.section(_TITLES[group]):
                    formatter.write_dl(rows[group], col_max=34)


def help_row(entry: Option) -> tuple[str, str]:
    """Return an option as help shows it: flag and value; help, default and variables."""
    value = "|".join(entry.choices) if entry.choices else entry.metavar
    value = value or _METAVARS.get(entry.kind, entry.kind.__name__.upper())
    facts = []
    shown_default = entry.default_text or _shown(entry.default)
    if shown_default:
        facts.append(f"default: {shown_default}")
    if entry.flag is None:
        facts.append("environment only")
        return entry.env[0], f"{entry.help}  [{'; '.join(facts)}]"
    if entry.env:
        facts.append(f"env: {', '.join(entry.env)}")
    left = entry.flag if entry.kind is bool else f"{entry.flag} {value}"
    return left, f"{entry.help}  [{'; '.join(facts)}]" if facts else entry.help


def table_options(names: Sequence[str]) -> Callable[[F], F]:
    """Decorate a command with options of the table, in the table's order."""
    return _decorator([one for one in LAUNCH_OPTIONS if one.name in names])


def own_options(*entries: Option) -> Callable[[F], F]:
    """Decorate a command with options of its own, shown and named like those of the table."""
    return _decorator(list(entries))


def secret_variables(names: Sequence[str]) -> list[Option]:
    """Return the table's entries among ``names`` that have a variable and no flag."""
    return [one for one in LAUNCH_OPTIONS if one.name in names and one.flag is None]


def _decorator(entries: list[Option]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for entry in reversed(entries):
            if entry.flag is not None:
                function = _click_option(entry)(function)
        return function

    return decorate


def _click_option(entry: Option) -> Callable[[F], F]:
    assert entry.flag is not None
    if entry.kind is bool:
        return click.option(
            entry.flag, entry.name, cls=TableOption, entry=entry, is_flag=True, default=None
        )
    return click.option(
        entry.flag,
        entry.name,
        cls=TableOption,
        entry=entry,
        type=click.STRING,
        multiple=entry.multiple,
        default=None,
    )


def _shown(default: Any) -> str:
    if default is None or default == ():
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default).lower()
