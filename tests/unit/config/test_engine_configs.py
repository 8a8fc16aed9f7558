from __future__ import annotations

import re
from pathlib import Path

import pytest

from trtllm_workers.config.disaggregation import require_same_blocks
from trtllm_workers.config.engine_config import load_engine_config, shown_value
from trtllm_workers.config.schema import trtllm_keys
from trtllm_workers.config.shipped import shipped_engine_config
from trtllm_workers.engines.registry import KEYED_ENGINES, engine_keys

FOLDER = Path(__file__).resolve().parents[3] / "engine_configs"
README = FOLDER / "README.md"
TABLE = re.compile(r"(<!-- keys: .*? -->\n).*?(<!-- end of keys -->)", re.DOTALL)


def key_table() -> str:
    """Return the Markdown table of keys: one row per key, one column per engine with its default."""
    keys = {engine: engine_keys(engine) for engine in sorted(KEYED_ENGINES)}
    lines = [
        f"| Key | {' | '.join(f'`{engine}` (default)' for engine in keys)} | Meaning |",
        "| --- |" + " --- |" * (len(keys) + 1),
    ]
    for name in sorted({name for one in keys.values() for name in one}):
        cells = [
            shown_value(one[name].default).replace("|", "\\|") if name in one else "–"
            for one in keys.values()
        ]
        helps = [one[name].help for one in keys.values() if name in one]
        meaning = max(helps, key=len).replace("|", "\\|")  # engines differ in detail, not in sense
        lines.append(f"| `{name}` | {' | '.join(cells)} | {meaning} |")
    return "\n".join(lines) + "\n"


def test_the_readme_says_which_engine_honours_which_key(update_golden: bool) -> None:
    text = README.read_text(encoding="utf-8")
    assert TABLE.search(text)
    expected = TABLE.sub(lambda match: match[1] + key_table() + match[2], text)
    if update_golden:
        README.write_text(expected, encoding="utf-8")
        return
    assert text == expected, "engine_configs/README.md differs; run: pytest --update-golden"


def test_the_readme_names_every_file() -> None:
    text = README.read_text(encoding="utf-8")
    assert all(f"`{path.name}`" in text for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("engine", sorted(KEYED_ENGINES))
def test_every_key_of_an_engine_is_a_key_of_tensorrt_llm(engine: str) -> None:
    assert set(engine_keys(engine)) <= trtllm_keys()


@pytest.mark.parametrize("name", ["agg.yaml", "prefill.yaml", "decode.yaml"])
@pytest.mark.parametrize("engine", sorted(KEYED_ENGINES))
def test_a_shipped_config_works_unchanged_on_every_engine(engine: str, name: str) -> None:
    path = shipped_engine_config(name)
    config = load_engine_config(engine, engine_keys(engine), path)
    from_file = {key for key in config.settings if f"{name}:" in config.source(key)}
    assert {"max_batch_size", "max_num_tokens", "kv_cache_config.tokens_per_block"} <= from_file
    assert config["max_num_tokens"] >= config["max_batch_size"]
    assert config["kv_cache_config.tokens_per_block"].bit_count() == 1


@pytest.mark.parametrize("engine", sorted(KEYED_ENGINES))
def test_shipped_configs_of_prefill_and_decode_fit_together(engine: str) -> None:
    prefill, decode = (
        load_engine_config(engine, engine_keys(engine), shipped_engine_config(name))
        for name in ("prefill.yaml", "decode.yaml")
    )
    require_same_blocks(prefill, decode)
    # The rules that the comments in the files give.
    block = prefill["kv_cache_config.tokens_per_block"]
    assert prefill["max_batch_size"] == prefill["max_num_tokens"] // block
    assert decode["max_num_tokens"] == 2 * decode["max_batch_size"]


def test_the_shipped_config_is_the_one_in_the_tree() -> None:
    assert shipped_engine_config("agg.yaml") == FOLDER / "agg.yaml"
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        shipped_engine_config("none.yaml")
