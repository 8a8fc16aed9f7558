"""Fixtures of the tests that need a GPU and TensorRT-LLM; everything is skipped, with the reason, without."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Workbench, workbench
from trtllm_workers.config.keys import EngineConfig, Setting
from trtllm_workers.deploy.inventory import visible_gpus
from trtllm_workers.engines.base import EngineOptions
from trtllm_workers.engines.registry import build_engine
from trtllm_workers.engines.trtllm.engine import TrtllmEngine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--model", help="folder of a small model for the tests on a GPU")
    parser.addoption("--vision-model", help="folder of a small vision-language model")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.trtllm)
            item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture(scope="session")
def gpus() -> tuple[str, ...]:
    found = visible_gpus({})
    if not found:
        pytest.skip("no NVIDIA GPU here")
    if importlib.util.find_spec("tensorrt_llm") is None:
        pytest.skip("TensorRT-LLM is not installed here")
    return found


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest, gpus: tuple[str, ...]) -> Path:
    given = request.config.getoption("--model", default=None)
    if not given:
        pytest.skip("no model: give --model DIR")
    return Path(str(given))


@pytest.fixture(scope="session")
def vision_model(request: pytest.FixtureRequest, gpus: tuple[str, ...]) -> Path:
    given = request.config.getoption("--vision-model", default=None)
    if not given:
        pytest.skip("no vision-language model: give --vision-model DIR")
    return Path(str(given))


SMALL = {
    "max_batch_size": 16,
    "max_num_tokens": 2048,
    "max_seq_len": 4096,
    "enable_chunked_prefill": True,
    "enable_iter_perf_stats": True,
    "kv_cache_config.free_gpu_memory_fraction": 0.3,
    "kv_cache_config.event_buffer_max_size": 1024,
    "guided_decoding_backend": "xgrammar",
}


@pytest.fixture
async def engine(model: Path) -> AsyncIterator[TrtllmEngine]:
    """A started adapter on the real package."""
    config = EngineConfig("trtllm", {key: Setting(value, "test") for key, value in SMALL.items()})
    made = build_engine("trtllm", EngineOptions(model, config))
    assert isinstance(made, TrtllmEngine)
    await made.start()
    yield made
    await made.close()


@pytest.fixture
def bench(tmp_path: Path, model: Path) -> Iterator[Workbench]:
    """A bench whose runs serve the model with engine trtllm."""
    with workbench(tmp_path) as made:
        made.environ |= {
            "ENGINE": "trtllm",
            "MODEL_PATH": str(model),
            "SERVED_MODEL_NAME": "demo",
            "START_TIMEOUT_S": "900",
        }
        yield made
