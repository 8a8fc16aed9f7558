"""Fixtures of the contract suites: one harness per engine variant."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.contract.certificates import Authority, authority
from tests.contract.engines import KINDS, EngineKind
from tests.contract.etcd import Admin, EtcdServer, admin, etcd_server
from tests.contract.etcd_watchers import Processes
from tests.contract.harness import Harness
from tests.contract.transports import KINDS as TRANSPORT_KINDS
from tests.contract.transports import Kind, Stage
from tests.fakes.stand_in import tensorrt_llm_stand_in
from trtllm_workers.config.outside import TlsFiles

_EOS = [1]
_namespaces = itertools.count()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by ``EngineKind.model``, made when first asked for."""
    return {"": tmp_path_factory.mktemp("checkpoints")}


@pytest.fixture(params=KINDS, ids=[kind.name for kind in KINDS])
def engine_kind(request: pytest.FixtureRequest) -> EngineKind:
    """Each engine variant in turn."""
    kind: EngineKind = request.param
    return kind


@pytest.fixture
async def harness(
    engine_kind: EngineKind, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Harness]:
    """A harness whose engines are closed after the test."""
    folder = checkpoints[""] / engine_kind.model / "model"
    if engine_kind.model not in checkpoints:
        engine_kind.write_checkpoint(folder, _EOS)
        checkpoints[engine_kind.model] = folder
    made = Harness(engine_kind, folder)
    with tensorrt_llm_stand_in() if engine_kind.engine == "trtllm" else nullcontext():
        monkeypatch.setenv("FAKE_TRTLLM_NUM_GPUS", "1")
        yield made
        await made.close()


@pytest.fixture(params=TRANSPORT_KINDS, ids=[kind.title for kind in TRANSPORT_KINDS])
def transport_kind(request: pytest.FixtureRequest) -> Kind:
    """Each KV transport in turn that has its package."""
    kind: Kind = request.param
    if reason := kind.missing():
        pytest.skip(reason)
    return kind


@pytest.fixture
async def stage(
    transport_kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Stage]:
    """Our end of a KV transport, and its peers."""
    for name, value in transport_kind.environ:
        monkeypatch.setenv(name, value)
    made = Stage(transport_kind, lambda: (tmp_path / os.urandom(8).hex()).open("w+b"))
    yield made
    await made.close()


@pytest.fixture(scope="session")
def cluster_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that signs for all processes of a cluster."""
    return authority(tmp_path_factory.mktemp("certificates") / "cluster")


@pytest.fixture(scope="session")
def plane_files(cluster_authority: Authority) -> TlsFiles:
    """The files of a process whose request plane is encrypted."""
    return cluster_authority.signs("process", alternative="DNS:no.name.of.any.host")


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """An etcd that no test disturbs; each test has a namespace of its own."""
    with etcd_server(tmp_path_factory.mktemp("etcd")) as made:
        yield made


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    """An etcd of this test alone."""
    with etcd_server(tmp_path / "etcd") as made:
        yield made


@pytest.fixture
def namespace() -> str:
    """A namespace of this test alone."""
    return f"test-{next(_namespaces)}"


@pytest.fixture
async def processes() -> AsyncIterator[Processes]:
    """Makes processes' views of discovery on etcd, and closes them."""
    made = Processes()
    yield made
    await made.close()


@pytest.fixture
async def operator(shared_server: EtcdServer) -> AsyncIterator[Admin]:
    """Who administers the shared etcd."""
    async with admin(shared_server) as made:
        yield made
