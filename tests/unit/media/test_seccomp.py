from __future__ import annotations

import os
import subprocess
import sys

import pytest

from trtllm_workers.media.seccomp import program

_TRIES = """
import os, resource, socket, sys, tempfile, threading
from pathlib import Path
import encodings.utf_16_le
from trtllm_workers.media.seccomp import give_up

ours, theirs = socket.socketpair()
read, write = os.pipe()
if not give_up():
    sys.exit(77)

def tries():
    yield "execve", lambda: os.execv("/bin/true", ["true"])
    yield "fork", os.fork
    yield "spawn", lambda: os.posix_spawn("/bin/true", ["true"], {})
    yield "kill", lambda: os.kill(os.getppid(), 0)
    yield "socket", socket.socket
    yield "unix socket", lambda: socket.socket(socket.AF_UNIX)
    yield "socketpair", socket.socketpair
    yield "create", lambda: open(sys.argv[1] + "/new", "w")
    yield "append", lambda: open(sys.argv[1] + "/old", "a")
    yield "cut", lambda: os.truncate(sys.argv[1] + "/old", 0)
    yield "remove", lambda: os.unlink(sys.argv[1] + "/old")
    yield "rename", lambda: os.rename(sys.argv[1] + "/old", sys.argv[1] + "/new")
    yield "folder", lambda: os.mkdir(sys.argv[1] + "/new")
    yield "link", lambda: os.symlink("/", sys.argv[1] + "/new")
    yield "mode", lambda: os.chmod(sys.argv[1] + "/old", 0)
    yield "limits", lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CORE)
    yield "device", lambda: open("/dev/null", "r+b")

for name, one in tries():
    try:
        one()
    except PermissionError:
        continue
    print("allowed:", name)

try:
    threading.Thread(target=print).start()
    print("allowed: thread")
except RuntimeError:
    pass

# What the children's work needs goes on.
assert open(sys.argv[1] + "/old").read() == "old"
ours.send(b"x")
assert theirs.recv(1) == b"x"
os.write(write, b"y")
assert os.read(read, 1) == b"y"
resource.setrlimit(resource.RLIMIT_CPU, (100, resource.getrlimit(resource.RLIMIT_CPU)[1]))
import wave  # from disk
assert len(bytearray(1 << 26)) == 1 << 26
print("done")
"""


def test_what_was_given_up_is_gone_and_the_rest_works(tmp_path: os.PathLike[str]) -> None:
    with open(os.path.join(tmp_path, "old"), "w", encoding="utf-8") as file:
        file.write("old")
    done = subprocess.run(
        [sys.executable, "-c", _TRIES, os.fspath(tmp_path)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("this kernel takes no filter, or it is none for this machine")
    assert (done.stdout, done.stderr) == ("done\n", "")
    assert os.listdir(tmp_path) == ["old"]


def run(machine: str, architecture: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """Run a filter as the kernel would; return its answer."""
    words = {0: number, 4: architecture}
    words |= {16 + 8 * index: value & 0xFFFF_FFFF for index, value in enumerate(arguments)}
    code, at, held = program(machine), 0, 0
    while True:
        kind, if_so, if_not, value = code[at]
        at += 1
        match kind:
            case 0x20:
                held = words[value]
            case 0x15:
                at += if_so if held == value else if_not
            case 0x45:
                at += if_so if held & value else if_not
            case 0x06:
                return value


ALLOW, KILL, EPERM, ENOSYS = 0x7FFF_0000, 0x8000_0000, 0x0005_0001, 0x0005_0026
X86, ARM = 0xC000_003E, 0xC000_00B7


@pytest.mark.parametrize(
    ("machine", "architecture", "number", "arguments", "answer"),
    [
        ("x86_64", X86, 0, (), ALLOW),  # read
        ("x86_64", X86, 59, (), EPERM),  # execve
        ("x86_64", X86, 257, (0, 0, os.O_RDONLY | os.O_CLOEXEC), ALLOW),
        ("x86_64", X86, 257, (0, 0, os.O_WRONLY), EPERM),
        ("x86_64", X86, 2, (0, os.O_RDWR), EPERM),
        ("x86_64", X86, 302, (0,), ALLOW),
        ("x86_64", X86, 302, (1,), EPERM),
        ("x86_64", X86, 435, (), ENOSYS),
        ("x86_64", X86, 0x4000_0000 | 59, (), KILL),
        ("x86_64", 0x4000_0003, 11, (), KILL),  # execve of 32 bits
        ("aarch64", ARM, 63, (), ALLOW),  # read
        ("aarch64", ARM, 221, (), EPERM),  # execve
        ("aarch64", ARM, 56, (0, 0, os.O_RDONLY), ALLOW),
        ("aarch64", ARM, 56, (0, 0, os.O_CREAT), EPERM),
        ("aarch64", X86, 63, (), KILL),
    ],
)
def test_filters(
    machine: str, architecture: int, number: int, arguments: tuple[int, ...], answer: int
) -> None:
    assert run(machine, architecture, number, arguments) == answer
