"""What every test may ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.golden_support import check_golden


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden instead of comparing"
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture
def golden(update_golden: bool) -> Callable[[str, str], None]:
    """Return ``golden(name, text)``, which compares text with a file under tests/golden."""
    return lambda name, text: check_golden(name, text, update=update_golden)


@pytest.fixture(scope="session")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return ``vision_model(family)``, the folder of a tiny model of images and text, written once."""
    from trtllm_workers.demo.vision import write_vision_model  # imports torch and transformers

    root = tmp_path_factory.mktemp("vision_models")

    def folder(family: str) -> Path:
        path = root / family
        return path if path.exists() else write_vision_model(path, family)

    return folder
