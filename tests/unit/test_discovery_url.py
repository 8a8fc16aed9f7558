"""Opening discovery by its URL, and the cluster secret that processes share."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.planes import record, soon, watching
from trtllm_workers.config.outside import EtcdLogin
from trtllm_workers.errors import ConfigError
from trtllm_workers.planes.discovery import (
    _make_secret,
    cluster_secret,
    discovery_root,
    open_discovery,
)
from trtllm_workers.planes.discovery_file import FileDiscovery

PATHS = {
    "file:///var/run/x": "/var/run/x",
    "file://localhost/var/run/x": "/var/run/x",
    "file:///with%20space": "/with space",
    "/plain/path": "/plain/path",
    "/with space?and#more": "/with space?and#more",
}


@pytest.mark.parametrize(("url", "path"), PATHS.items(), ids=PATHS)
def test_url_names_a_folder(url: str, path: str) -> None:
    assert discovery_root(url) == Path(path)


def test_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert discovery_root("runs/one") == tmp_path / "runs" / "one"
    assert isinstance(open_discovery("runs/one"), FileDiscovery)


def test_home_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert discovery_root("~/runs") == Path("/home/somebody/runs")


BAD_URLS = {
    "etcd://a b": "is no address; write HOST:PORT",
    "http://example.org/": "is not supported; write file:///path",
    "//host/path": "is not supported; write file:///path",
    "file://relative/path": "file:///relative/path",
    "file://": "names no folder",
    "file:relative": "names no folder",
    "  ": "discovery is empty",
}


@pytest.mark.parametrize(("url", "words"), BAD_URLS.items(), ids=BAD_URLS)
def test_url_that_is_not_understood_says_what_to_write(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_discovery(url)


@pytest.mark.parametrize("url", ["etcd://a:1,b:2", "etcds://a"])
def test_etcd_url_opens_discovery_on_etcd(url: str) -> None:
    pytest.importorskip("aetcd")
    assert type(open_discovery(url)).__name__ == "EtcdDiscovery"


def test_etcd_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aetcd.rpc", None)
    with pytest.raises(ConfigError, match=r"pip install 'trtllm-launch\[etcd\]'"):
        open_discovery("etcd://localhost:2379")


def test_etcd_user_without_a_password_is_refused() -> None:
    pytest.importorskip("aetcd")
    with pytest.raises(ConfigError, match="ETCD_PASSWORD"):
        open_discovery("etcd://localhost:2379", login=EtcdLogin("ann"))


def test_discovery_in_a_folder_imports_nothing_of_etcd() -> None:
    code = (
        "import sys; from trtllm_workers.planes.discovery import *; open_discovery('/x');"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('aetcd', 'grpc')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "[]\n", done.stderr


def test_default_namespace_is_the_folder_itself_and_others_lie_in_it(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    secrets = {name: cluster_secret(url, None, name) for name in ("default", "blue", "green")}
    assert len(set(secrets.values())) == 3
    assert (tmp_path / "secret").read_bytes().strip() == secrets["default"]
    assert (tmp_path / "namespaces/blue/secret").read_bytes().strip() == secrets["blue"]


async def test_namespaces_of_one_folder_do_not_see_each_other(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    blue, green, default = (open_discovery(url, name) for name in ("blue", "green", "default"))
    mine = record("worker-0")
    await blue.register(mine)
    for discovery, records in ((blue, (mine,)), (green, ()), (default, ())):
        async with watching(discovery) as watch:
            assert await soon(anext(watch)) == records
        await soon(discovery.close())


def test_given_secret_is_taken(tmp_path: Path) -> None:
    assert cluster_secret(str(tmp_path / "none"), "tell nobody") == b"tell nobody"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("given", ["", "  \n"])
def test_empty_secret_is_refused(tmp_path: Path, given: str) -> None:
    with pytest.raises(ConfigError, match="empty"):
        cluster_secret(str(tmp_path), given)


def test_secret_is_made_once_and_for_the_owner_alone(tmp_path: Path) -> None:
    root = tmp_path / "new" / "folder"
    first = cluster_secret(str(root), None)
    assert len(first) == 64
    assert cluster_secret(str(root), None) == first
    assert cluster_secret(str(tmp_path / "other"), None) != first
    assert stat.S_IMODE((root / "secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert os.listdir(root) == ["secret"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_secret_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    cluster_secret(str(tmp_path), None)
    (tmp_path / "secret").chmod(mode)
    with pytest.raises(ConfigError, match=rf"open to others \(mode {mode:o}\).*rm '"):
        cluster_secret(str(tmp_path), None)


@pytest.mark.parametrize("content", [b"", b"short\n", b" " * 100])
def test_file_without_a_secret_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "secret").write_bytes(content)
    (tmp_path / "secret").chmod(0o600)
    with pytest.raises(ConfigError, match="holds no cluster secret"):
        cluster_secret(str(tmp_path), None)


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match=r"cannot keep the cluster secret in .*/file/secret"):
        cluster_secret(str(tmp_path / "file"), None)


def test_secret_that_another_process_made_meanwhile_is_kept(tmp_path: Path) -> None:
    first = cluster_secret(str(tmp_path), None)
    _make_secret(tmp_path / "secret")  # this one had found no file a moment ago
    assert cluster_secret(str(tmp_path), None) == first
    assert os.listdir(tmp_path) == ["secret"]


RACE = """
import sys
from trtllm_workers.planes.discovery import cluster_secret
sys.stdin.read()
print(cluster_secret(sys.argv[1], None).decode())
"""


def test_processes_that_start_together_end_with_one_secret(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.close()
        racer.stdin = None
    secrets = {racer.communicate(timeout=30)[0] for racer in racers}
    assert len(secrets) == 1
    assert len(secrets.pop().strip()) == 64
