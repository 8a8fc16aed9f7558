"""One clean message and the right exit code; a traceback only when asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trtllm_workers import __version__
from trtllm_workers.cli import main as cli
from trtllm_workers.errors import ConfigError, EngineDead, LaunchError, StartError


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trtllm_workers.cli.main", *words],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **env},
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["upp"], "unknown command 'upp'; did you mean 'up'?"),
        (["xyzzy"], "unknown command 'xyzzy'; there are: up, plan, ingress"),
        (["up", "--http-prt", "1"], "unknown option --http-prt; did you mean --http-port?"),
        (["up", "--zzz"], "unknown option --zzz; see: trtllm-launch up --help"),
        (["up", "--http-port"], "Option '--http-port' requires an argument."),
        (["up", "--http-port", "abc"], "--http-port: must be a whole number, not 'abc'"),
        (["plan", "--engine", "troch"], "did you mean 'torch'?"),
        (
            ["worker", "--discovery", "file:///x", "--role", "prefil"],
            "--role: must be one of aggregated, prefill, decode",
        ),
        (["ingress"], "say where workers register: --discovery file:///some/directory"),
        (["ingress", "--discovery", "file:///x", "--plane-port", "-1"], "--plane-port: must be"),
        (["stop", "abc123", "--all"], "give a run id or --all, not both"),
        (["ps", "extra"], "unexpected extra argument"),
    ],
)
def test_wrong_words_get_one_message_and_exit_code_2(
    words: list[str], message: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    done = run(*words, MODEL_PATH=str(model), ENGINE="sim", XDG_STATE_HOME=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("trtllm-launch: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_debug_adds_the_traceback_and_keeps_message_and_exit_code() -> None:
    for done in (run("--debug", "upp"), run("upp", TRTLLM_LAUNCH_DEBUG="1")):
        assert done.returncode == 2
        assert "Traceback" in done.stderr
        assert "trtllm-launch: unknown command 'upp'; did you mean 'up'?" in done.stderr


@pytest.mark.parametrize("error", [ConfigError, StartError, EngineDead])
def test_exit_code_is_the_error_s_own(
    error: type[LaunchError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_args: object, **_more: object) -> None:
        raise error("first line\nsecond line")

    monkeypatch.setattr(cli.group, "main", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main(["up"])
    assert ended.value.code == error.exit_code
    assert capsys.readouterr().err == "trtllm-launch: first line\n  second line\n"


def test_ctrl_c_outside_a_run_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object, **_more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.group, "main", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main(["up"])
    assert ended.value.code == 130


def test_version_is_the_package_s() -> None:
    assert run("--version").stdout == f"trtllm-launch {__version__}\n"


def test_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        [
            "bash",
            "-c",
            f"set -o pipefail; {sys.executable} -m trtllm_workers.cli.main --help | true",
        ],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "Traceback" not in done.stderr


def test_process_whose_launcher_is_gone_does_not_start() -> None:
    """The pid of a process that has ended: nobody would ever end the new one."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    done = run("--version", TRTLLM_LAUNCH_PARENT_PID=str(ended.pid))
    assert (done.returncode, done.stdout) == (0, "")


def test_process_below_the_launcher_s_child_starts() -> None:
    """The launcher lives, but somebody (mpirun) stands between: that is no reason to end."""
    code = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, sys.executable, "-m", "trtllm_workers.cli.main", "--version"],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "TRTLLM_LAUNCH_PARENT_PID": str(os.getpid())},
    )
    assert done.stdout == f"trtllm-launch {__version__}\n"
