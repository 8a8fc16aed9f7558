"""Fixtures of the end-to-end tests: a bench per test, and one shared run that serves the demo model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Workbench, workbench


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    with workbench(tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a run that serves the demo model on the torch engine."""
    with workbench(tmp_path_factory.mktemp("served")) as made:
        _, url = made.up("--engine", "torch")
        yield url
