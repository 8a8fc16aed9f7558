"""Flag over environment over default: typed values, sources and problems while they are collected."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from trtllm_workers.config.env import read_text
from trtllm_workers.config.options import LAUNCH_OPTIONS, Option
from trtllm_workers.config.values import coerce, form, parse, problem, shown


class Layers:
    """Values and sources being collected, and every problem met on the way."""

    def __init__(
        self,
        explicit: Mapping[str, Any],
        environ: Mapping[str, str],
        options: Sequence[Option] = LAUNCH_OPTIONS,
    ) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.problems: list[tuple[str, str]] = []
        self.warnings: list[str] = []
        for option in options:
            self._take(option, explicit.get(option.name), environ)

    def given(self, name: str) -> bool:
        """Return whether a flag or a variable set it."""
        return self.sources[name] != "default"

    def fail(self, name: str, text: str) -> None:
        """Note what is wrong with an option; where its value came from stands in front."""
        source = self.sources.get(name, "default")
        self.problems.append((name, text if source == "default" else f"{source}: {text}"))

    def default(self, name: str, value: Any, source: str = "default") -> None:
        """Set what the layers left open."""
        if self.values[name] is None:
            self.values[name], self.sources[name] = value, source

    def _take(self, option: Option, given: Any, environ: Mapping[str, str]) -> None:
        variable = read_text(option.env, environ)
        if given is not None and given != ():
            self.sources[option.name] = option.flag or option.name
            self.values[option.name] = self._typed(option, given)
        elif variable is not None:
            self.sources[option.name] = f"environment {variable[0]}"
            self.values[option.name] = self._typed(option, variable[1])
            self._note_conflict(option, variable, environ)
        else:
            self.sources[option.name] = "default"
            self.values[option.name] = option.default

    def _typed(self, option: Option, given: Any) -> Any:
        if option.multiple:
            return _several(given) if isinstance(given, str) else tuple(given)
        if isinstance(given, str) and not given.strip():
            self.fail(option.name, "must not be empty")
            return option.default
        try:
            if isinstance(given, str):
                # Choices are words; nobody means another engine by writing it in capitals.
                text = _word(given, option.choices) if option.choices else given
                value = parse(text, option.kind)
            else:
                value = coerce(given, option.kind)
        except ValueError:
            self.fail(
                option.name, f"must be {form(option.kind)}, not {self._quoted(option, given)}"
            )
            return option.default
        wrong = problem(
            value, minimum=option.minimum, maximum=option.maximum, choices=option.choices
        )
        if wrong:
            self.fail(option.name, wrong)
            return option.default
        return value

    @staticmethod
    def _quoted(option: Option, given: Any) -> str:
        return "what is set" if option.secret else shown(given)

    def _note_conflict(
        self, option: Option, used: tuple[str, str], environ: Mapping[str, str]
    ) -> None:
        for other in option.env:
            text = environ.get(other, "").strip()
            if other != used[0] and text and text != used[1].strip():
                self.warnings.append(f"environment {other} is ignored: {used[0]} is set as well")


def _word(given: str, choices: Collection[str]) -> str:
    """Return a choice in our spelling: ``round-robin`` is ``round_robin``."""
    text = given.strip().casefold()
    ours = text.replace("-", "_")
    return ours if ours in choices else text


def _several(text: str) -> tuple[str, ...]:
    """Return the values in a variable of an option that may be given several times: commas between."""
    return tuple(word for one in text.split(",") if (word := one.strip()))


def file_problem(path: Path | None) -> str | None:
    """Return what is wrong with the path of a file, as the end of a sentence, or None."""
    try:
        if path is None or path.is_file():
            return None
        what = "is a folder, not a YAML file" if path.is_dir() else "does not exist"
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
    return f"{shown(path)} {what}"
