"""Runs the scripts of container/ with fake engines on PATH. Holds no test."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "container"
# What people's paths, names and passwords hold; a script must hand each on as it is.
AWKWARD = ["a b", "it's", 'say "hi"', "a;b", "$HOME", "`id`", "new\nline", "*", "-n", "ü\\"]
ENGINES = ("docker", "podman", "buildah")
_FAKE = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" >"$CALLS"
env -0 >"$CALLS.env"
exit 7
"""


class Bench:
    """A PATH with the engines that a test wants, and what they were called with."""

    def __init__(self, path: Path) -> None:
        self.bin = path / "bin"
        self.bin.mkdir()
        # Programs the scripts use, and no engine that this machine may have.
        for program in ("bash", "dirname", "env", "git", "readlink"):
            (self.bin / program).symlink_to(
                subprocess.run(
                    ["bash", "-c", f"type -P {program}"], capture_output=True, text=True, check=True
                ).stdout.strip()
            )
        self._calls = path / "calls"
        self.home = path / "home"
        self.home.mkdir()
        self.cwd = path

    def install(self, *engines: str) -> None:
        for engine in engines:
            fake = self.bin / engine
            fake.write_text(_FAKE)
            fake.chmod(0o755)

    def run(self, script: str, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        self._calls.unlink(missing_ok=True)
        return subprocess.run(
            [str(FOLDER / script), *words],
            capture_output=True,
            text=True,
            timeout=30,
            cwd=self.cwd,
            env={
                "PATH": str(self.bin),
                "HOME": str(self.home),
                "CALLS": str(self._calls),
                "LC_ALL": "C.UTF-8",
                **environ,
            },
        )

    def call(self, script: str, *words: str, **environ: str) -> list[str]:
        """Return what the engine got. The fake ends with 7, which must come through."""
        done = self.run(script, *words, **environ)
        assert done.returncode == 7, done.stderr
        return self._calls.read_bytes().decode().split("\0")[:-1]

    def passed_on(self) -> dict[str, str]:
        """Return the environment that the engine got."""
        text = Path(f"{self._calls}.env").read_bytes().decode()
        return dict(pair.split("=", 1) for pair in text.split("\0")[:-1])

    def refused(self, script: str, *words: str, **environ: str) -> str:
        """Return the message of a call that must end with 2 and reach no engine."""
        done = self.run(script, *words, **environ)
        assert done.returncode == 2, done.stdout + done.stderr
        assert not self._calls.exists()
        assert not done.stdout
        return done.stderr

    def shown(self, script: str, *words: str, **environ: str) -> str:
        """Return the line of a dry run, which must reach no engine."""
        done = self.run(script, "--dry-run", *words, **environ)
        assert done.returncode == 0, done.stderr
        assert not self._calls.exists()
        return done.stdout


def pairs(words: list[str], flag: str) -> list[str]:
    """Return the values of a flag."""
    return [words[at + 1] for at, word in enumerate(words) if word == flag]


def split_as_bash_does(line: str) -> list[str]:
    """Return the words of a line, as a shell reads it that somebody pastes it into."""
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"],
        capture_output=True,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        timeout=20,
        check=True,
    )
    return done.stdout.decode().split("\0")[:-1]


def versions() -> dict[str, str]:
    """Return what versions.env says."""
    lines = (FOLDER / "versions.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
