"""Fixtures of the contract suites: one harness per engine variant."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contract.engines import KINDS, EngineKind
from tests.contract.harness import Harness

_EOS = [1]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by engine name, made when first asked for."""
    return {"": tmp_path_factory.mktemp("checkpoints")}


@pytest.fixture(params=KINDS, ids=[kind.name for kind in KINDS])
def engine_kind(request: pytest.FixtureRequest) -> EngineKind:
    """Each engine variant in turn."""
    kind: EngineKind = request.param
    return kind


@pytest.fixture
async def harness(engine_kind: EngineKind, checkpoints: dict[str, Path]) -> AsyncIterator[Harness]:
    """A harness whose engines are closed after the test."""
    folder = checkpoints[""] / engine_kind.engine / "model"
    if engine_kind.engine not in checkpoints:
        engine_kind.write_checkpoint(folder, _EOS)
        checkpoints[engine_kind.engine] = folder
    made = Harness(engine_kind, folder)
    yield made
    await made.close()
