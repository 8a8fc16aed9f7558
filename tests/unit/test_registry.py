from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trtllm_workers.config.keys import Key, default_config
from trtllm_workers.config.values import coerce, problem
from trtllm_workers.engines import registry
from trtllm_workers.engines.base import EngineOptions
from trtllm_workers.engines.registry import (
    ENGINES,
    KEYED_ENGINES,
    EngineEntry,
    build_engine,
    engine_keys,
)
from trtllm_workers.errors import ConfigError


def options(engine: str = "sim") -> EngineOptions:
    return EngineOptions(Path("nowhere"), default_config(engine, engine_keys(engine)))


@pytest.mark.parametrize("name", ["simm", "", "auto", "SIM"])
def test_an_unknown_engine_is_refused_with_the_choices(name: str) -> None:
    for call in (lambda: engine_keys(name), lambda: build_engine(name, options())):
        with pytest.raises(ConfigError, match=r"unknown engine '.*'; choose one of: auto, .*sim"):
            call()


@pytest.mark.parametrize("name", KEYED_ENGINES)
def test_keys_have_defaults_that_pass_their_own_checks(name: str) -> None:
    keys = engine_keys(name)
    assert keys
    for dotted, key in keys.items():
        assert isinstance(key, Key)
        assert key.kind in (int, float, bool, str), dotted
        assert key.help, dotted
        assert not key.help.endswith("."), dotted
        if key.default is None:
            assert key.optional, dotted
            continue
        assert coerce(key.default, key.kind) == key.default, dotted
        wrong = problem(key.default, minimum=key.minimum, maximum=key.maximum, choices=key.choices)
        assert wrong is None, f"{dotted} {wrong}"


@pytest.mark.parametrize("name", KEYED_ENGINES)
def test_engines_share_the_keys_every_launcher_sets(name: str) -> None:
    assert {
        "max_batch_size",
        "max_num_tokens",
        "max_seq_len",
        "enable_chunked_prefill",
        "kv_cache_config.tokens_per_block",
        "kv_cache_config.max_tokens",
        "kv_cache_config.enable_block_reuse",
    } <= engine_keys(name).keys()


@pytest.mark.parametrize("name", KEYED_ENGINES)
def test_keys_are_light_to_import(name: str) -> None:
    code = (
        "import sys; from trtllm_workers.engines.registry import engine_keys; "
        f"engine_keys({name!r}); "
        "print([m for m in ('torch', 'transformers', 'numpy', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_build_returns_an_engine_that_has_read_nothing() -> None:
    assert build_engine("sim", options()).stats().total_blocks == 0


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = EngineEntry(keys=ENGINES["sim"].keys, build="needs_more:build")
    monkeypatch.setitem(registry.ENGINES, "fancy", entry)
    with pytest.raises(
        ConfigError, match=r"'no_such_package_anywhere'.* pip install 'trtllm-launch\[fancy\]'"
    ):
        build_engine("fancy", options())


def test_default_config_refuses_an_override_that_is_no_key() -> None:
    with pytest.raises(KeyError, match=r"kv_cache_config\.max_token'"):
        default_config("sim", engine_keys("sim"), kv_cache_config__max_token=5)
