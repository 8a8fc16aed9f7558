from __future__ import annotations

import json

from trtllm_workers.lint.formats import as_github, as_json, as_text, exit_code
from trtllm_workers.lint.problem import Edit, Problem, Severity

ERROR = Problem(
    Severity.ERROR,
    "draft-graph-tokens",
    "a step is too small: 100 %",
    file="a,b.yaml",
    line=7,
    column=3,
    key="max_num_tokens",
    advice="write 512",
    arithmetic=("256 × 2 = 512 > 256",),
)
WARNING = Problem(
    Severity.WARNING, "x-y", "look\nhere", file="a.yaml", edits=(Edit(1, 1, ("a: 1",)),)
)
NOTE = Problem(Severity.NOTE, "z", "by the way")


def test_text_is_a_line_with_what_belongs_to_it_below() -> None:
    assert as_text([ERROR, WARNING, NOTE], 2) == (
        "a,b.yaml:7: error[draft-graph-tokens]: a step is too small: 100 %\n"
        "  256 × 2 = 512 > 256\n"
        "  → write 512\n"
        "a.yaml: warning[x-y]: look\nhere\n"
        "note[z]: by the way\n"
        "2 files: 1 error, 1 warning, 1 note"
    )
    assert as_text([], 1) == "1 file: nothing wrong"


def test_json_has_every_field_and_says_what_fix_mends() -> None:
    found = json.loads(as_json([ERROR, WARNING]))
    assert found[0] == {
        "severity": "error",
        "rule": "draft-graph-tokens",
        "message": "a step is too small: 100 %",
        "file": "a,b.yaml",
        "line": 7,
        "column": 3,
        "key": "max_num_tokens",
        "advice": "write 512",
        "arithmetic": ["256 × 2 = 512 > 256"],
        "fixable": False,
    }
    assert found[1]["fixable"] is True
    assert json.loads(as_json([])) == []


def test_github_commands_are_escaped() -> None:
    assert as_github([ERROR, WARNING, NOTE]).split("\n") == [
        "::error file=a%2Cb.yaml,line=7,col=3,title=draft-graph-tokens::"
        "a step is too small: 100 %25%0A256 × 2 = 512 > 256%0Awrite 512",
        "::warning file=a.yaml,title=x-y::look%0Ahere",
        "::notice title=z::by the way",
    ]


def test_the_exit_code_tells_the_worst() -> None:
    assert exit_code([NOTE], strict=True) == 0
    assert exit_code([NOTE, WARNING], strict=False) == 1
    assert exit_code([WARNING], strict=True) == 2
    assert exit_code([WARNING, ERROR], strict=False) == 2
