"""Asks a program something, with a deadline: a broken driver shows up as a line and not as a hang."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

ASK_TIMEOUT_S = 60.0


def ask(argv: Sequence[str], timeout_s: float = ASK_TIMEOUT_S) -> tuple[str] | str:
    """Return (what a program wrote,), or how it failed."""
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:.0f} s"
    except OSError as wrong:
        return wrong.strerror or str(wrong)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return (done.stdout,)
