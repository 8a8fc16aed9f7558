"""A real SLURM cluster on this machine: slurmctld, and a slurmd in each of some namespaces. Needs root.

The work is done by ``mini_slurm.sh`` beside this file. One machine holds one such cluster at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

SCRIPT = Path(__file__).with_name("mini_slurm.sh")
# CI sets it: a cluster that cannot be had is a failure then, and missing packages are installed.
REQUIRED = bool(os.environ.get("TRTLLM_LAUNCH_REQUIRE_SLURM"))
PARTITION = "batch"

_PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client"}
_LOCK = Path("/run/mini-slurm.lock")
_INSTALL_TIMEOUT_S = 240.0
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
_COMMAND_TIMEOUT_S = 30.0
_POLL_S = 0.1


def why_not() -> str:
    """Return why no cluster can be started here; "" when one can."""
    if os.geteuid() != 0:
        return "a SLURM cluster of our own needs root"
    words = ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "true"]
    if shutil.which("ip"):
        bridge = "ip link add b0 type bridge && ip link add v0 type veth peer name v1"
        words[-1:] = ["sh", "-c", bridge]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S)
    except OSError as wrong:
        return f"namespaces cannot be made: {wrong}"
    if done.returncode:
        return f"network namespaces cannot be made: {done.stderr.strip()}"
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    missing = [package for name, package in _PROGRAMS.items() if not shutil.which(name, path=path)]
    if missing and not (REQUIRED and shutil.which("apt-get")):
        return (
            f"no SLURM here: apt-get install {' '.join(missing)} munge libpmix2, "
            "or set TRTLLM_LAUNCH_REQUIRE_SLURM=1 and the tests install it"
        )
    return ""


class MiniCluster:
    """A cluster whose login node is this machine. Use ``running``, which stops it again.

    * ``run`` asks on the login node, ``exec`` inside a node; both end what they started at the deadline.
    * A killed node is a crashed one: its processes are gone at once, and SLURM finds out by itself.
    * ``stop`` ends every job, daemon and namespace, and is safe twice and after a failed start.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: tuple[str, ...] = ()
        self.gpus_per_node = 0
        self.has_pyxis = False
        self._lock: IO[str] | None = None

    @property
    def environ(self) -> dict[str, str]:
        """The environment for commands that talk to this cluster, and not to another one."""
        ours = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "SRUN", "SALLOC", "MSL_"))
        }
        return ours | {"SLURM_CONF": "/run/mini-slurm/slurm.conf"}

    def start(
        self, nodes: int = 4, gpus: int = 8, pyxis: bool = False, private_tmp: bool = False
    ) -> None:
        """Start it and wait until every node is idle. Takes away what a killed run has left."""
        self._take_lock()
        self._script("stop", timeout_s=_STOP_TIMEOUT_S)
        knobs = {"MSL_MODE": "netns", "MSL_NODES": str(nodes), "MSL_GPUS": str(gpus)}
        if pyxis:
            knobs["MSL_PYXIS"] = "1"
        if private_tmp:
            knobs["MSL_PRIVATE_TMP"] = "1"
        if not REQUIRED:
            knobs["MSL_NO_APT"] = "1"
        limit_s = _START_TIMEOUT_S + (_INSTALL_TIMEOUT_S if REQUIRED else 0)
        self._script("start", timeout_s=limit_s, environ=knobs)
        self.nodes = tuple(f"sn{index}" for index in range(1, nodes + 1))
        self.gpus_per_node = gpus
        self.has_pyxis = pyxis

    def stop(self) -> None:
        if self._lock is None:
            return  # never started; what runs there is another's
        try:
            self._script("stop", timeout_s=_STOP_TIMEOUT_S)
        finally:
            self._lock.close()
            self._lock = None
            self.nodes = ()

    def argv(self, node: str, words: Sequence[str]) -> list[str]:
        """Return what runs a command inside a node, in the folder it is started in."""
        return [str(SCRIPT), "exec", node, *words]

    def exec(
        self, node: str, words: Sequence[str], timeout_s: float = _COMMAND_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside a node to its end, whatever its exit code."""
        return self.run(self.argv(node, words), timeout_s=timeout_s)

    def run(
        self,
        words: Sequence[str],
        timeout_s: float = _COMMAND_TIMEOUT_S,
        environ: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node to its end, whatever its exit code."""
        with subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**self.environ, **(environ or {})},
            cwd=self.folder,
            start_new_session=True,
        ) as started:
            try:
                out, err = started.communicate(timeout=timeout_s)
            except BaseException:
                os.killpg(started.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(list(words), started.returncode, out, err)

    def kill_node(self, node: str) -> None:
        """Crash a node: everything in it is gone, and so is its network."""
        self._script("kill-node", node, timeout_s=_COMMAND_TIMEOUT_S)

    def start_node(self, node: str) -> None:
        """Boot a killed node and wait until its slurmd answers and SLURM would use it."""
        self._script("start-node", node, timeout_s=_COMMAND_TIMEOUT_S)
        deadline = time.monotonic() + _COMMAND_TIMEOUT_S
        while self.exec(node, ["scontrol", "show", "slurmd"]).returncode:
            assert time.monotonic() < deadline, f"slurmd of {node} is silent; {self.logs()}"
            time.sleep(_POLL_S)
        self.wait_for_state(node, "idle")

    def wait_for_state(self, node: str, wanted: str, timeout_s: float = 30.0) -> None:
        """Wait until SLURM reports a node as ``wanted`` (idle, down, …)."""
        deadline = time.monotonic() + timeout_s
        while (seen := self._state(node)) != wanted:
            assert time.monotonic() < deadline, f"{node} is {seen}, not {wanted}; {self.logs()}"
            time.sleep(_POLL_S)  # slurmctld announces nothing

    def logs(self) -> str:
        """Return the last lines of every daemon."""
        return self.run([str(SCRIPT), "logs"]).stdout

    def _state(self, node: str) -> str:
        done = self.run(["sinfo", "--noheader", "--nodes", node, "--format", "%T"])
        return done.stdout.strip().rstrip("*")

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        lock = _LOCK.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise RuntimeError(
                "another run of these tests has its SLURM cluster up on this machine"
            ) from None
        self._lock = lock

    def _script(
        self, *words: str, timeout_s: float, environ: Mapping[str, str] | None = None
    ) -> None:
        # Into a file: the daemons it leaves behind would hold a pipe open.
        log = self.folder / "mini_slurm.log"
        with log.open("a+") as out:
            started_at = out.tell()
            with subprocess.Popen(
                [str(SCRIPT), *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**self.environ, **(environ or {})},
                start_new_session=True,
            ) as started:
                try:
                    code = started.wait(timeout_s)
                except BaseException:
                    # Its traps clean up; only a script that hangs even then is killed.
                    started.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        started.wait(_STOP_TIMEOUT_S)
                    started.kill()
                    raise
        said = log.read_text(errors="replace")[started_at:]
        if code:
            raise RuntimeError(f"mini_slurm.sh {' '.join(words)} ended with {code}:\n{said}")


@contextlib.contextmanager
def running(
    folder: Path, nodes: int = 4, gpus: int = 8, pyxis: bool = False, private_tmp: bool = False
) -> Iterator[MiniCluster]:
    """Start a cluster, and stop it again."""
    cluster = MiniCluster(folder)
    try:
        cluster.start(nodes, gpus, pyxis, private_tmp)
        yield cluster
    finally:
        cluster.stop()
