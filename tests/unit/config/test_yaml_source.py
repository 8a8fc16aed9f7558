from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_workers.config.yaml_source import (
    YamlItem,
    YamlMapping,
    YamlWord,
    display_path,
    load_yaml,
    parse_yaml,
    plain_scalar,
)
from trtllm_workers.errors import ConfigError


def values(text: str) -> dict[str, object]:
    return {item.key: item.value for item in parse_yaml(text, "f.yaml").items}


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f.yaml")
    return str(caught.value)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "null\n", "~"])
def test_an_empty_file_has_no_keys(text: str) -> None:
    assert parse_yaml(text, "f.yaml") == YamlMapping(())


def test_items_carry_line_and_column_of_their_key() -> None:
    inner = YamlItem("b", 1, 2, 3)
    assert parse_yaml("a:\n  b: 1\n", "f.yaml").items == (
        YamlItem("a", YamlMapping((inner,)), 1, 1),
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-3", -3),
        ("1_000", 1000),
        ("0", 0),
        ("8e-1", 0.8),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1E3", 1000.0),
        ("true", True),
        ("False", False),
        ("~", None),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        (".nan", ".nan"),
        ("2024-01-01", "2024-01-01"),
        ("text", "text"),
        ("9" * 1000, "9" * 1000),
    ],
)
def test_plain_scalars_are_read_as_yaml_1_2_has_them(text: str, value: object) -> None:
    read = plain_scalar(text)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("word", ["yes", "No", "ON", "off"])
def test_words_that_readers_disagree_on_are_marked(word: str) -> None:
    marked = plain_scalar(word)
    assert isinstance(marked, YamlWord)
    assert marked.as_bool is (word.lower() in ("yes", "on"))
    assert values(f"a: '{word}'") == {"a": word}


def test_a_leading_zero_is_explained() -> None:
    marked = plain_scalar("010")
    assert isinstance(marked, YamlWord)
    assert "octal 8" in marked.advice


def test_quoted_scalars_stay_text() -> None:
    assert values("a: '1'\nb: \"true\"\nc: ''") == {"a": "1", "b": "true", "c": ""}


def test_anchors_and_merges_are_followed_and_own_keys_win() -> None:
    read = values("base: &b {x: 1, y: 2}\nown:\n  <<: *b\n  y: 3\nsame: *b\n")
    own, same = read["own"], read["same"]
    assert isinstance(own, YamlMapping)
    assert isinstance(same, YamlMapping)
    assert {item.key: item.value for item in own.items} == {"x": 1, "y": 3}
    assert {item.key: item.value for item in same.items} == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml:3:1: key 'a' is given twice, first in line 1"),
        ("a:\n\tb: 1", "f.yaml:2:1: found character '\\t' that cannot start any token"),
        ("a: [1\n", "f.yaml:2:1: expected ',' or ']'"),
        ("a: b: c", "f.yaml:1:5: mapping values are not allowed here"),
        ("- 1\n- 2", "f.yaml:1:1: the file must hold 'key: value' lines"),
        ("just text", "f.yaml:1:1: the file must hold 'key: value' lines"),
        ("a: *b", "f.yaml:1:4: found undefined alias 'b'"),
        ("a: &x {b: *x}", "f.yaml:1:4: an alias contains itself"),
        ("a: 1\n---\nb: 2", "f.yaml:2:1: expected a single document in the stream"),
        ("a: !!python/name:os.system", "f.yaml:1:4: the tag !!python/name:os.system is not"),
        ("a: !mine 1", "f.yaml:1:4: the tag !mine is not supported"),
        ("1.5: 2", "f.yaml:1:1: a key must be a word, not 1.5"),
        ("true: 2", "f.yaml:1:1: a key must be a word, not true"),
        ("? [a]\n: 2", "f.yaml:1:3: a key must be a word"),
        ("a: 1\nb: \x01", "f.yaml:2: the character U+0001 is not allowed"),
        ("<<: 3", "f.yaml:1:5: '<<' needs a section to merge"),
        ("[" * 100_000, "f.yaml: nested too deeply"),
    ],
)
def test_broken_yaml_is_refused_with_its_place(text: str, message: str) -> None:
    assert refused(text).startswith(message)


def test_a_tab_gets_advice() -> None:
    assert refused("a:\n\tb: 1").endswith("; indent with spaces, not tabs")


def test_aliases_cannot_blow_a_small_file_up() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert "more than 10000 values" in refused("\n".join(lines))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*none\.yaml"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_yaml(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nb: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: not UTF-8 text"):
        load_yaml(latin)
    large = tmp_path / "large.yaml"
    large.write_text("# comment\n" * 30_000)
    with pytest.raises(ConfigError, match="larger than 256 KiB"):
        load_yaml(large)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\n")
    assert load_yaml(path).items[0].key == "a"


def test_paths_are_shown_relative_when_that_is_shorter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert display_path(tmp_path / "configs" / "agg.yaml") == os.path.join("configs", "agg.yaml")
    monkeypatch.chdir("/")
    assert display_path(Path("/etc/x.yaml")) == "etc/x.yaml"
    deep = tmp_path / "a" / "b" / "c" / "d" / "e" / "f" / "g" / "h" / "i" / "j" / "k" / "l"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert display_path(Path("/x.yaml")) == "/x.yaml"


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_never_crashed_on(text: str) -> None:
    try:
        said = repr(parse_yaml(text, "f.yaml"))
    except ConfigError as error:
        said = str(error)
    assert said.startswith(("YamlMapping(", "f.yaml:"))
