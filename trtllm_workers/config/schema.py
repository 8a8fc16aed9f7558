"""TensorRT-LLM's engine YAML as data: keys, types, bounds, defaults of each version. Checks no value.

Adding a version is adding a file to ``schemas/``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

TRTLLM_VERSION = "1.2.1"
_FILE = re.compile(r"trtllm_(\d+(?:_\d+)*)\.json")
_TOP = "TorchLlmArgs"
_LITERAL = re.compile(r"'([^']*)'")


@dataclass(frozen=True, slots=True)
class KeySpec:
    """What one key takes.

    ``type`` is written as TensorRT-LLM writes it. ``choices`` holds for the value, or for each item of a
    list; with ``any_case`` their case does not count. ``minimum`` and ``maximum`` are inclusive, ``items_min``
    is a bound of list items. ``alias`` is another name of the key.
    """

    type: str
    default: Any = None
    required: bool = False
    choices: tuple[str, ...] = ()
    any_case: bool = False
    minimum: float | None = None
    maximum: float | None = None
    items_min: float | None = None
    not_empty: bool = False
    not_null: bool = False
    only_null: bool = False
    alias: str = ""
    deprecated: bool = False

    @property
    def nullable(self) -> bool:
        """Return whether null is a value."""
        is_optional = self.type.startswith("Optional[") or "NoneType" in self.type
        return is_optional and not self.not_null


@dataclass(frozen=True, slots=True)
class Renamed:
    """What became of a key: in words, and how a file is mended.

    ``how``: ``rename`` (also into another section), ``invert`` (a boolean of opposite meaning), ``lift`` (the
    keys inside move up), ``switch`` (false is null for the section ``to``).
    """

    says: str
    how: str
    to: str


@dataclass(frozen=True, slots=True)
class Selected:
    """A section whose keys depend on the value of the key ``by``: ``of`` names the keys by that value.

    ``refused`` holds values that TensorRT-LLM knows and does not take here, with the reason; ``later`` those of
    newer releases, with the nearest value of this one ("": there is none).
    """

    by: str
    of: Mapping[str, Mapping[str, KeySpec]]
    refused: Mapping[str, str]
    later: Mapping[str, str]
    any_case: bool = False

    def choice(self, given: object) -> str | None:
        """Return the value that ``given`` is, in its own case; None for none that has keys."""
        if not isinstance(given, str):
            return None
        folded = given.casefold() if self.any_case else given
        return next(
            (one for one in self.of if (one.casefold() if self.any_case else one) == folded), None
        )


@dataclass(frozen=True, slots=True)
class Schema:
    """The engine-YAML keys of one TensorRT-LLM version.

    ``keys``: dotted key → type as TensorRT-LLM writes it; sections are keys too. ``sections``: dotted name
    of a section ("" is the top) → its keys. ``optional`` sections are off by default. ``free``: keys
    under which any key may stand. ``renamed``: keys of older releases and what became of them, ``moved``
    how a file is mended; ``later`` keys belong to newer releases, ``never`` ones to no YAML, with the reason.
    ``uncertain`` sections are described after a neighbouring release. ``defaults``: dotted leaf → default,
    for sections that are off by default as well.
    """

    version: str
    keys: Mapping[str, str]
    sections: Mapping[str, Mapping[str, KeySpec]]
    optional: frozenset[str]
    selected: Mapping[str, Selected]
    free: frozenset[str]
    renamed: Mapping[str, str]
    moved: Mapping[str, Renamed]
    uncertain: frozenset[str]
    later: frozenset[str]
    never: Mapping[str, str]
    defaults: Mapping[str, Any] = field(repr=False)

    def knows(self, dotted: str) -> bool:
        """Return whether ``dotted`` is a key, or stands under a key that takes any."""
        if dotted in self.keys:
            return True
        parents = dotted.split(".")[:-1]
        return any(".".join(parents[:end]) in self.free for end in range(1, len(parents) + 1))

    def spec(self, dotted: str, choice: str | None = None) -> KeySpec | None:
        """Return what a key takes, None when it is none. ``choice`` is as in ``keys_of``."""
        section, _, key = dotted.rpartition(".")
        selected = self.selected.get(section)
        if selected is not None and key == selected.by:
            return KeySpec(
                type=self.keys[dotted],
                required=True,
                choices=tuple(selected.of),
                any_case=selected.any_case,
            )
        keys = self.keys_of(section, choice)
        if keys is None:
            return None
        return keys.get(key) or next(
            (one for one in keys.values() if key and one.alias == key), None
        )

    def keys_of(self, section: str, choice: str | None = None) -> Mapping[str, KeySpec] | None:
        """Return the keys of a section, None when it is none.

        ``choice`` is the value of a selected section's selector; without it all its shapes count.
        """
        selected = self.selected.get(section)
        if selected is None:
            return self.sections.get(section)
        if choice is not None and choice in selected.of:
            return selected.of[choice]
        return {key: spec for keys in selected.of.values() for key, spec in keys.items()}


@cache
def trtllm_schema(version: str = TRTLLM_VERSION) -> Schema:
    """Return the schema of a TensorRT-LLM version. Raises LookupError for one not described here."""
    name = f"trtllm_{version.replace('.', '_')}.json"
    file = resources.files("trtllm_workers.config").joinpath("schemas", name)
    if not file.is_file():
        raise LookupError(
            f"no key list for TensorRT-LLM {version}; there is: {', '.join(described_versions())}"
        )
    return _schema(json.loads(file.read_text(encoding="utf-8")))


@cache
def described_versions() -> tuple[str, ...]:
    """Return the TensorRT-LLM versions whose keys are known, oldest first."""
    folder = resources.files("trtllm_workers.config").joinpath("schemas")
    found = [match[1] for entry in folder.iterdir() if (match := _FILE.fullmatch(entry.name))]
    numbers = sorted(tuple(map(int, one.split("_"))) for one in found)
    return tuple(".".join(map(str, one)) for one in numbers)


def trtllm_keys(version: str = TRTLLM_VERSION) -> frozenset[str]:
    """Return every dotted key of a TensorRT-LLM version's engine YAML, sections included."""
    return frozenset(trtllm_schema(version).keys)


def _schema(described: Mapping[str, Any]) -> Schema:
    classes = {
        name: {key: _spec(one) for key, one in keys.items() if not one.get("not_yaml")}
        for name, keys in described["sections"].items()
    }
    sections = {"": classes[_TOP]}
    sections |= {under: classes[name] for under, name in described["under"].items()}
    selected = {
        under: Selected(
            by=one["by"],
            of={choice: classes[name] for choice, name in one["of"].items()},
            refused=one["refused"],
            later=one["later"],
            any_case=one.get("any_case", False),
        )
        for under, one in described["selected"].items()
    }
    return Schema(
        version=described["tensorrt_llm"],
        keys=_flat(sections, selected),
        sections=sections,
        optional=frozenset(described["optional"]),
        selected=selected,
        free=frozenset(described["free"]),
        renamed={old: one["says"] for old, one in described["renamed"].items()},
        moved={old: Renamed(**one) for old, one in described["renamed"].items()},
        uncertain=frozenset(
            under for under, name in described["under"].items() if name in described["uncertain"]
        ),
        later=frozenset(described["later"]),
        never=described["never"],
        defaults=_defaults(sections, selected),
    )


def _spec(one: Mapping[str, Any]) -> KeySpec:
    return KeySpec(
        type=one["type"],
        default=one.get("default"),
        required=one.get("required", False),
        choices=tuple(one.get("choices") or _LITERAL.findall(one["type"])),
        any_case=one.get("any_case", False),
        minimum=one.get("min"),
        maximum=one.get("max"),
        items_min=one.get("items_min"),
        not_empty=one.get("not_empty", False),
        not_null=one.get("not_null", False),
        only_null=one.get("only_null", False),
        alias=one.get("alias", ""),
        deprecated=one.get("deprecated", False),
    )


def _flat(
    sections: Mapping[str, Mapping[str, KeySpec]], selected: Mapping[str, Selected]
) -> dict[str, str]:
    keys: dict[str, str] = {}
    shapes = [(under, one) for under, one in sections.items()]
    for under, section in selected.items():
        values = ", ".join(f"'{one}'" for one in dict.fromkeys((*section.of, *section.refused)))
        keys[f"{under}.{section.by}"] = f"Literal[{values}]"
        shapes += [(under, one) for one in section.of.values()]
    for under, specs in shapes:
        for key, spec in specs.items():
            for name in filter(None, (key, spec.alias)):
                keys[f"{under}.{name}" if under else name] = spec.type
    return keys


def _defaults(
    sections: Mapping[str, Mapping[str, KeySpec]], selected: Mapping[str, Selected]
) -> dict[str, Any]:
    """Return every leaf's default. Of a section with several shapes: where they do not differ."""
    inner = {*sections, *selected}
    found: dict[str, Any] = {}
    differing: set[str] = set()
    shapes = [*sections.items()]
    shapes += [(under, keys) for under, one in selected.items() for keys in one.of.values()]
    for under, specs in shapes:
        for name, spec in specs.items():
            key = f"{under}.{name}" if under else name
            if key not in inner and found.setdefault(key, spec.default) != spec.default:
                differing.add(key)
    return {key: default for key, default in found.items() if key not in differing}
