"""What every test may ask for."""

from __future__ import annotations

from collections.abc import Callable

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
