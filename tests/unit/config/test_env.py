from __future__ import annotations

from pathlib import Path

import pytest

from trtllm_workers.config.env import (
    calm_openmp,
    child_environment,
    environment,
    hub_cache_dir,
    read_text,
    state_dir,
    suspicious_variables,
    wants_colour,
)
from trtllm_workers.config.options import LAUNCH_OPTIONS

OURS = {name for option in LAUNCH_OPTIONS for name in option.env}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MODEL_PAHT", "MODEL_PATH"),
        ("MODELPATH", "MODEL_PATH"),
        ("SERVED_MODEL", "SERVED_MODEL_NAME"),
        ("SERVED_MODEL_NAMES", "SERVED_MODEL_NAME"),
        ("AGG_ENGINE_ARG", "AGG_ENGINE_ARGS"),
        ("AGG_ENGINE", "AGG_ENGINE_ARGS"),
        ("ENGIN", "ENGINE"),
        ("HTTP_PROT", "HTTP_PORT"),
        ("START_TIMEOUT", "START_TIMEOUT_S"),
        ("CLUSTER_SECRETS", "CLUSTER_SECRET"),
    ],
)
def test_a_near_miss_is_pointed_out_without_its_value(name: str, meant: str) -> None:
    (warning,) = suspicious_variables(OURS, {name: "the-value"})
    assert warning == f"environment {name} is set, but has no effect; did you mean {meant}?"


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "HOME",
        "HTTP_PROXY",
        "HTTPS_PORT",
        "LOGNAME",
        "HOSTNAME",
        "MODEL_PATH",
        "HTTP_PORT",
        "XDG_RUNTIME_DIR",
        "PWD",
        "OLDPWD",
        "TMPDIR",
        "LANG",
        "SHELL",
        "DISPLAY",
        "MODEL",
    ],
)
def test_ours_and_innocent_variables_are_not(name: str) -> None:
    assert suspicious_variables(OURS, {name: "x"}) == []


def test_variables_of_the_wider_family_are_said_to_have_no_effect() -> None:
    assert suspicious_variables(OURS, {"ENCODE_ENDPOINT": "dyn://e", "NATS_SERVER": ""}) == [
        "environment ENCODE_ENDPOINT is set, but has no effect: encode workers are found by themselves"
    ]


def test_the_first_variable_that_is_set_wins_and_blank_is_unset() -> None:
    assert read_text(("A", "B"), {"A": " ", "B": "2"}) == ("B", "2")
    assert read_text(("A", "B"), {"A": "1", "B": "2"}) == ("A", "1")
    assert read_text(("A",), {}) is None


def test_a_child_gets_our_environment_with_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.setenv("REMOVED", "1")
    child = child_environment({"REMOVED": None, "ADDED": "2"})
    assert (child["KEPT"], child["ADDED"]) == ("1", "2")
    assert "REMOVED" not in child


def test_runs_are_kept_where_xdg_says() -> None:
    assert state_dir({"XDG_STATE_HOME": "/s", "HOME": "/h"}) == Path("/s/trtllm-launch")
    assert state_dir({"XDG_STATE_HOME": "relative", "HOME": "/h"}) == Path(
        "/h/.local/state/trtllm-launch"
    )
    assert state_dir({}).name.startswith("trtllm-launch-")


def test_the_hub_cache_is_found_as_hugging_face_tools_do() -> None:
    assert hub_cache_dir({"HF_HUB_CACHE": "/c", "HF_HOME": "/f"}) == Path("/c")
    assert hub_cache_dir({"HF_HOME": "/f"}) == Path("/f/hub")
    assert hub_cache_dir({"HOME": "/h"}) == Path("/h/.cache/huggingface/hub")
    assert hub_cache_dir({}) is None


@pytest.mark.parametrize(
    ("environ", "is_terminal", "wanted"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"TERM": "dumb"}, True, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
        ({"FORCE_COLOR": "1"}, False, True),
    ],
)
def test_colour_follows_terminal_and_wishes(
    environ: dict[str, str], is_terminal: bool, wanted: bool
) -> None:
    assert wants_colour(environ, is_terminal) is wanted


def test_openmp_is_calmed_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    calm_openmp()
    assert environment()["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    calm_openmp()
    assert int(environment()["GOMP_SPINCOUNT"]) > 0
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    calm_openmp()
    assert "GOMP_SPINCOUNT" not in environment()
