from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import (
    byte_level_tokenizer,
    metaspace_tokenizer,
    write_checkpoint,
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def metaspace() -> Tokenizer:
    return metaspace_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("byte-level"), tokenizer)


@pytest.fixture(scope="session")
def metaspace_checkpoint(tmp_path_factory: pytest.TempPathFactory, metaspace: Tokenizer) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("metaspace"), metaspace)
