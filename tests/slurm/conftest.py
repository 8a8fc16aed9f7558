"""Fixtures of the tests on a real SLURM cluster, which they start themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import REQUIRED, MiniCluster, running, why_not

_WITH_INSTALLATION_S = 360


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.timeout(_WITH_INSTALLATION_S))


@pytest.fixture(scope="session")
def mini_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniCluster]:
    """A cluster of four nodes with eight GPUs each, as SLURM believes, which knows pyxis' options.

    Skips where none can be started, and says why; fails there where CI requires one.
    """
    if reason := why_not():
        if REQUIRED:
            pytest.fail(f"TRTLLM_LAUNCH_REQUIRE_SLURM is set, but {reason}")
        pytest.skip(reason)
    with running(tmp_path_factory.mktemp("cluster"), nodes=4, gpus=8, pyxis=True) as started:
        yield started
