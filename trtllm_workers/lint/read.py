"""An engine YAML to a typed document: every key, type, choice and bound checked against a version's schema."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtllm_workers.config.engine_config import Override
from trtllm_workers.config.schema import TRTLLM_VERSION, KeySpec, Schema, trtllm_schema
from trtllm_workers.config.spelling import nearest
from trtllm_workers.config.values import listed, shown
from trtllm_workers.config.yaml_source import (
    YamlItem,
    YamlMapping,
    YamlValue,
    display_path,
    load_yaml,
    parse_yaml,
)
from trtllm_workers.errors import ConfigError
from trtllm_workers.lint.document import Document, Place
from trtllm_workers.lint.problem import Edit, Problem, Severity
from trtllm_workers.lint.sections import check_section, check_top
from trtllm_workers.lint.types_of_keys import WrongType, convert, form_of, type_of
from trtllm_workers.types import Role


def read_document(
    path: Path | None,
    role: Role,
    *,
    version: str = TRTLLM_VERSION,
    overrides: Sequence[Override] = (),
) -> tuple[Document, list[Problem]]:
    """Return the config of one role and everything that is wrong with its keys and values.

    ``overrides`` win over the file. Raises ConfigError when the file cannot be read as YAML.
    """
    name = display_path(path) if path is not None else ""
    mapping = load_yaml(path) if path is not None else YamlMapping(())
    return _Reader(name, role, path, trtllm_schema(version), overrides).read(mapping)


def parse_document(
    text: str, name: str, role: Role, *, version: str = TRTLLM_VERSION
) -> tuple[Document, list[Problem]]:
    """Return what ``read_document`` does, for a text instead of a file."""
    return _Reader(name, role, None, trtllm_schema(version), ()).read(parse_yaml(text, name))


class _Reader:
    def __init__(
        self,
        name: str,
        role: Role,
        path: Path | None,
        schema: Schema,
        overrides: Sequence[Override],
    ) -> None:
        self._name = name
        self._role = role
        self._path = path
        self._schema = schema
        # A flag beats the environment, and of two of one kind the later wins.
        self._overrides = sorted(overrides, key=lambda one: not one.from_environment)
        self._values: dict[str, Any] = {}
        self._places: dict[str, Place] = {}
        self._problems: list[Problem] = []
        self._choices: dict[str, str] = {}

    def read(self, mapping: YamlMapping) -> tuple[Document, list[Problem]]:
        self._section(mapping, "")
        for override in self._overrides:
            self._override(override)
        document = Document(
            name=self._name,
            role=self._role,
            path=self._path,
            values=self._values,
            defaults=self._schema.defaults,
            places=self._places,
            version=self._schema.version,
        )
        self._problems += check_top(document)
        for section in dict.fromkeys((*self._schema.sections, *self._schema.selected)):
            choice = self._choices.get(section)
            keys = self._schema.keys_of(section, choice) or {}
            self._problems += check_section(document, section, keys, choice)
        return document, self._problems

    # --- a file ------------------------------------------------------------------------------------

    def _section(self, mapping: YamlMapping, section: str) -> None:
        selected = self._schema.selected.get(section)
        if selected is not None:
            self._select(mapping, section)
        for item in mapping.items:
            dotted = f"{section}.{item.key}" if section else item.key
            if selected is not None and item.key == selected.by:
                continue
            self._item(item, section, dotted)

    def _item(self, item: YamlItem, section: str, dotted: str) -> None:
        place = Place(f"{self._name}:{item.line}", item.line, item.column)
        keys = self._schema.keys_of(section, self._choices.get(section)) or {}
        name, spec = _spec_of(item.key, keys)
        full = f"{section}.{name}" if section else name
        if spec is None:
            self._unknown(item, section, dotted, place)
            return
        if full in self._places:
            other = self._places[full].source
            text = f"'{item.key}' is another name of '{name}', which is set too ({other})"
            self._fail("alias-and-name", dotted, text, place, advice="keep one of them")
            return
        self._places[full] = place
        if spec.deprecated:
            self._tell(Severity.NOTE, "deprecated-key", full, f"'{dotted}' is deprecated", place)
        inner = full if full in self._schema.sections or full in self._schema.selected else ""
        if inner and isinstance(item.value, YamlMapping):
            self._section(item.value, full)  # an empty one leaves every default
        else:
            self._value(full, spec, item.value, place, item)

    def _select(self, mapping: YamlMapping, section: str) -> None:
        """Take the selector first: it says which keys the section has."""
        selected = self._schema.selected[section]
        dotted = f"{section}.{selected.by}"
        item = next((one for one in mapping.items if one.key == selected.by), None)
        if item is None:
            place = self._places.get(section, Place(self._name))
            text = f"'{section}' needs '{selected.by}': {listed(tuple(selected.of))}"
            self._fail("missing-key", dotted, text, place)
            return
        place = Place(f"{self._name}:{item.line}", item.line, item.column)
        self._places[dotted] = place
        value = item.value
        if isinstance(value, str) and selected.any_case:
            value = value.lower()
        if not isinstance(value, str) or (
            value not in selected.of and value not in selected.refused
        ):
            near = nearest(str(value), list(selected.of)) if isinstance(value, str) else None
            hint = f"write {near}" if near else ""
            allowed = tuple(one for one in selected.of if one not in selected.refused)
            text = f"'{dotted}' must be {listed(allowed)}, not {_said(value)}"
            edits = self._replace_word(item, near) if near else ()
            self._fail("wrong-value", dotted, text, place, advice=hint, edits=edits)
            return
        self._values[dotted] = value
        self._choices[section] = value
        if value in selected.refused:
            text = f"'{dotted}: {value}' is refused: {selected.refused[value]}"
            self._fail("refused-value", dotted, text, place)

    # --- a flag ------------------------------------------------------------------------------------

    def _override(self, override: Override) -> None:
        place = Place(f"{override.source} {override.key}")
        section, _, key = override.key.rpartition(".")
        keys = self._schema.keys_of(section, self._choices.get(section))
        name, spec = _spec_of(key, keys or {})
        if section in self._schema.selected and key == self._schema.selected[section].by:
            spec = KeySpec(type="str", choices=tuple(self._schema.selected[section].of))
        if spec is None and self._schema.knows(override.key):  # below a free mapping
            spec = KeySpec(type="object")
        if spec is None:
            item = YamlItem(key, None, 0, 0)
            self._unknown(item, section, override.key, place)
            return
        full = f"{section}.{name}" if section else name
        self._places.pop(full, None)
        self._values.pop(full, None)
        value: YamlValue = override.value
        if isinstance(value, str):
            try:
                value = parse_yaml(f"value: {value}", place.source).items[0].value
            except ConfigError:
                value = override.value
        self._places[full] = place
        self._value(full, spec, value, place, None)

    # --- values ------------------------------------------------------------------------------------

    def _value(
        self, key: str, spec: KeySpec, given: YamlValue, place: Place, item: YamlItem | None
    ) -> None:
        if spec.only_null and given is not None:
            self._fail(
                "refused-value", key, f"'{key}' must stay null: TensorRT-LLM refuses a value", place
            )
            return
        is_section = key in self._schema.sections or key in self._schema.selected
        if is_section and given is None:
            if spec.type.startswith(("Optional", "Union")):
                self._values[key] = None
            else:
                advice = "remove it, or indent keys under it"
                self._fail("wrong-type", key, f"section '{key}' is empty", place, advice=advice)
            return
        if key == "moe_config.load_balancer" and isinstance(given, str):
            self._values[key] = given
            return
        if is_section:
            keys = self._schema.keys_of(key) or {}
            text = f"'{key}' is a section, not {_said(given)}"
            self._fail(
                "wrong-type", key, text, place, advice=f"indent keys under it: {', '.join(keys)}"
            )
            return
        kind = type_of(spec.type)
        try:
            if given is None and spec.not_null:
                raise WrongType("null")
            found = convert(kind, given)
        except WrongType as wrong:
            form = listed(spec.choices) if spec.choices else form_of(kind)
            self._fail("wrong-type", key, f"'{key}' must be {form}, not {wrong}", place)
            return
        if found.lenient:
            text = f"'{key}' must be {form_of(kind)}, not {_said(given)}"
            self._tell(Severity.WARNING, "lenient-type", key, text, place, advice=found.lenient)
        value = found.value
        if wrong_text := self._outside(key, spec, value):
            near = self._meant(spec, value)
            edits = self._replace_word(item, near) if near and item is not None else ()
            advice = f"write {near}" if near else ""
            self._fail("wrong-value", key, wrong_text, place, advice=advice, edits=edits)
            return
        if spec.choices and spec.any_case and isinstance(value, str):
            value = value.upper()
        self._values[key] = value

    def _outside(self, key: str, spec: KeySpec, value: Any) -> str:
        """Return what is wrong with a value of the right type, "" when nothing is."""
        if value is None:
            return ""
        items = value if isinstance(value, list) else [value]
        if spec.choices:
            for one in items:
                word = one.upper() if spec.any_case and isinstance(one, str) else one
                if word not in spec.choices:
                    return f"'{key}' must be {listed(spec.choices)}, not {shown(one)}"
        if spec.not_empty and isinstance(value, list) and not value:
            return f"'{key}' must not be an empty list"
        if spec.items_min is not None and any(one < spec.items_min for one in items):
            return f"every item of '{key}' must be {spec.items_min:g} or more, not {shown(value)}"
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high = spec.minimum, spec.maximum
            if (low is not None and value < low) or (high is not None and value > high):
                bounds = f"{low:g} to {high:g}" if high is not None else f"{low:g} or more"
                return f"'{key}' must be {bounds}, not {shown(value)}"
        return ""

    def _meant(self, spec: KeySpec, value: Any) -> str | None:
        if not isinstance(value, str) or not spec.choices:
            return None
        same = [one for one in spec.choices if one.casefold() == value.casefold()]
        return same[0] if same else nearest(value, list(spec.choices))

    # --- what is no key ----------------------------------------------------------------------------

    def _unknown(self, item: YamlItem, section: str, dotted: str, place: Place) -> None:
        schema = self._schema
        if dotted in schema.renamed:
            self._places[dotted] = place
            text = f"'{dotted}' is a key of older TensorRT-LLM releases: {schema.renamed[dotted]}"
            advice = "trtllm-launch lint --fix writes it anew" if self._path is not None else ""
            self._fail("old-key", dotted, text, place, advice=advice)
            return
        if dotted in schema.never:
            text = f"'{dotted}' is no key of an engine YAML: {schema.never[dotted]}"
            advice = "" if text.endswith("remove it") else "remove it"
            self._fail("unknown-key", dotted, text, place, advice=advice)
            return
        if dotted in schema.later:
            text = f"'{dotted}' is a key of TensorRT-LLM 1.3 or later, not of {schema.version}"
            self._fail("newer-key", dotted, text, place, advice="remove it")
            return
        if "." in item.key and schema.knows(dotted):
            above, _, last = dotted.rpartition(".")
            self._fail(
                "unknown-key",
                dotted,
                f"unknown key '{item.key}'",
                place,
                advice=f"write '{last}:' indented under '{above}:'",
            )
            return
        near, where = self._near(item.key, section)
        advice = f"did you mean '{near}'?" if near else ""
        edits = self._rename(item, near) if near and not where and "." not in near else ()
        if near and where:
            advice = (
                f"'{near}' is a key of the section '{where}'"
                if where != "top"
                else (f"'{near}' stands at the top level")
            )
        self._fail(
            "unknown-key", dotted, f"unknown key '{dotted}'", place, advice=advice, edits=edits
        )

    def _near(self, key: str, section: str) -> tuple[str, str]:
        """Return the likeliest key, and the section it stands in when that is another one."""
        keys = self._schema.keys_of(section, self._choices.get(section)) or {}
        if near := nearest(key, list(keys)):
            return near, ""
        for other in ("", *self._schema.sections, *self._schema.selected):
            if other != section and key in (self._schema.keys_of(other) or {}):
                return key, other or "top"
        return "", ""

    # --- findings ----------------------------------------------------------------------------------

    def _rename(self, item: YamlItem, name: str) -> tuple[Edit, ...]:
        return self._edit_line(item, item.key, name)

    def _replace_word(self, item: YamlItem, word: str) -> tuple[Edit, ...]:
        if not isinstance(item.value, str):
            return ()
        return self._edit_line(item, item.value, word, after_key=item.key)

    def _edit_line(
        self, item: YamlItem, old: str, new: str, after_key: str = ""
    ) -> tuple[Edit, ...]:
        """Return the edit that replaces one word of the key's line, if the word stands there once."""
        if self._path is None or not item.line:
            return ()
        line = self._path.read_text(encoding="utf-8-sig").splitlines()[item.line - 1]
        at = item.column - 1 + len(after_key)
        head, tail = line[:at], line[at:]
        if tail.count(old) != 1:
            return ()
        return (Edit(item.line, item.line, (head + tail.replace(old, new),)),)

    def _fail(
        self,
        rule: str,
        key: str,
        text: str,
        place: Place,
        *,
        advice: str = "",
        edits: tuple[Edit, ...] = (),
    ) -> None:
        self._tell(Severity.ERROR, rule, key, text, place, advice=advice, edits=edits)

    def _tell(
        self,
        severity: Severity,
        rule: str,
        key: str,
        text: str,
        place: Place,
        *,
        advice: str = "",
        edits: tuple[Edit, ...] = (),
    ) -> None:
        message = text if place.line else f"{place.source}: {text}"
        self._problems.append(
            Problem(
                severity,
                rule,
                message,
                file=self._name if place.line else "",
                line=place.line,
                column=place.column,
                key=key,
                advice=advice,
                edits=edits,
            )
        )


def _spec_of(key: str, keys: Any) -> tuple[str, KeySpec | None]:
    """Return the key's own name and what it takes; an alias stands for its key."""
    if key in keys:
        return key, keys[key]
    for name, spec in keys.items():
        if spec.alias == key:
            return name, spec
    return key, None


def _said(value: YamlValue) -> str:
    if isinstance(value, YamlMapping):
        return "a section of keys"
    if isinstance(value, tuple):
        return "a list"
    return shown(str(value)) if not isinstance(value, bool | int | float | None) else shown(value)
