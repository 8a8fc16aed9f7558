"""``slurm run`` in an allocation where srun fails: what it says is understood, and nothing stays behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

# What srun, slurmd, enroot and pyxis write, in the form that they have it.
IMAGE_GONE = """\
slurmstepd-n2: error: pyxis: failed to import docker image
slurmstepd-n2: error: pyxis: printing enroot log file:
slurmstepd-n2: error: pyxis:     [ERROR] URL https://registry/v2/x/manifests/1 returned error code: 404 Not Found
slurmstepd-n2: error: spank: required plugin spank_pyxis.so: task_init() failed with rc=-1
srun: error: n2: task 1: Exited with exit code 1"""


def run(
    tmp_path: Path, srun: str, *words: str, **environ: str
) -> tuple[subprocess.CompletedProcess[str], float]:
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in (("srun", srun), ("sinfo", "exit 0"), ("squeue", "exit 0")):
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "trtllm_workers.cli.main", "slurm", "run", *words],
        capture_output=True,
        text=True,
        timeout=40,
        cwd=tmp_path,
        env={
            "PATH": f"{programs}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "RUN_DIR": str(tmp_path / "runs"),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "ENGINE": "torch",
            "NUM_WORKERS": "2",
            **environ,
        },
    )
    left = [path for path in (tmp_path / "runs").glob("*/*") if path.name != "logs"]
    assert [path for path in left if path.parent.name != "history"] == []
    return done, time.monotonic() - began


@pytest.mark.parametrize(
    ("said", "words", "hint"),
    [
        (IMAGE_GONE, (), "the image could not be had; check IMAGE"),
        (
            "srun: unrecognized option '--container-image=x'\nTry \"srun --help\" for more information",
            ("--image", "x"),
            "srun knows no containers here (no pyxis); leave IMAGE empty",
        ),
        (
            "slurmstepd: error: execve(): /opt/venv/bin/python: No such file or directory",
            (),
            "the Python that runs trtllm-launch is not on this node",
        ),
        (
            "/usr/bin/python3: Error while finding module specification "
            "(ModuleNotFoundError: No module named 'trtllm_workers')",
            (),
            "trtllm-launch is not installed in that Python",
        ),
        (
            "srun: error: Unable to confirm allocation for job 4711: Invalid job id specified",
            (),
            "the allocation is over; make a new one",
        ),
    ],
)
def test_srun_that_fails_is_explained_and_quoted(
    tmp_path: Path, said: str, words: tuple[str, ...], hint: str
) -> None:
    script = "echo 'Welcome to the cluster! 10.1.2.3'\ncat >&2 <<'EOT'\n" + said + "\nEOT\nexit 1"
    done, _ = run(tmp_path, script, *words)
    assert done.returncode == 2
    text = done.stdout + done.stderr
    assert "n1, n2 have not answered the check" in text
    assert hint in text
    assert f"| {said.splitlines()[-1]}" in text, "in srun's own words, too"
    assert "Traceback" not in text


def test_srun_that_hangs_is_ended_in_time(tmp_path: Path) -> None:
    script = f"echo $$ > {tmp_path}/pid; exec sleep 1000"
    done, took_s = run(tmp_path, script, "--preflight-timeout-s", "1")
    assert done.returncode == 2
    assert "n1, n2 have not answered the check within 1 s (--preflight-timeout-s)" in done.stderr
    assert took_s < 20
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_where_there_is_no_slurm_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "trtllm_workers.cli.main", "slurm", "run"],
        capture_output=True,
        text=True,
        timeout=40,
        cwd=tmp_path,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path), "ENGINE": "torch"},
    )
    assert done.returncode == 2
    assert "cannot start sbatch" in done.stderr
    assert "take 'trtllm-launch up' for this host alone" in done.stderr


def test_half_an_allocation_is_named(tmp_path: Path) -> None:
    done, _ = run(tmp_path, "exit 1", SLURM_JOB_NODELIST="")
    assert done.returncode == 2
    assert "SLURM_JOB_ID is 4711, but SLURM_JOB_NODELIST is not set" in done.stderr


def test_a_chatty_node_is_no_trouble(tmp_path: Path) -> None:
    """The answers of nodes come in files; a banner with an address in it is no answer."""
    script = (
        'for word in "$@"; do [[ "$word" == *runs/* ]] && folder="$word"; done\n'
        "echo '10.9.9.9 is my address'; echo 'module: command not found' >&2\n"
        "case \"$*\" in *preflight*) ;; *) echo 'part says no'; exit 7;; esac\n"
        "for node in n1 n2; do\n"
        '  printf \'{"node":"%s","host":"%s","address":"10.0.0.1","version":"%s","python":"3.11.0",'
        '"now_s":1}\' $node $node "$VERSION" > "$folder/nodes/$node.json"\n'
        "done"
    )
    from trtllm_workers import __version__

    done, _ = run(tmp_path, script, VERSION=__version__)
    assert "2 nodes of job 4711 checked" in done.stdout
    assert done.returncode == 3, "the parts themselves fail here"
    assert "ended with exit code 7" in done.stderr
    assert "10.9.9.9" not in done.stderr.replace("| 10.9.9.9 is my address", "")
