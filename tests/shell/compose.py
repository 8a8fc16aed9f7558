"""Reads the compose files as podman-compose does, with a fake podman. Holds no test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "container"
SECRETS = {"CLUSTER_SECRET": "a secret of 24 characters", "NATS_TOKEN": "1234567"}


def config(path: Path, *files: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Return what ``config`` prints of files, all profiles included; `.env` files give variables."""
    fake = path / "podman"
    fake.write_text("#!/bin/sh\necho podman version 5.0.0\n")
    fake.chmod(0o755)
    words = []
    for name in files or ("versions.env", "compose.yaml"):
        words += ["--env-file" if name.endswith(".env") else "-f", str(FOLDER / name)]
    return subprocess.run(
        [sys.executable, "-m", "podman_compose", *words, "--profile", "disagg", "config"],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": f"{path}:{os.environ['PATH']}", **environ},
        cwd=path,
    )


def services(path: Path, *files: str, **environ: str) -> dict[str, dict[str, Any]]:
    """Return the services, every variable filled in."""
    done = config(path, *files, **{**SECRETS, **environ})
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = yaml.safe_load(done.stdout)["services"]
    return found
