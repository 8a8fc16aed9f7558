from __future__ import annotations

import re
from pathlib import Path

import pytest

from trtllm_workers.config.engine_config import load_engine_config, shown_value
from trtllm_workers.config.schema import trtllm_keys
from trtllm_workers.config.shipped import shipped_engine_config
from trtllm_workers.engines.registry import ENGINES, engine_keys

FOLDER = Path(__file__).resolve().parents[3] / "engine_configs"
README = FOLDER / "README.md"
TABLE = re.compile(r"(<!-- keys: .*? -->\n).*?(<!-- end of keys -->)", re.DOTALL)


def key_table() -> str:
    """Return the Markdown table of keys: one row per key, one column per engine with its default."""
    keys = {engine: engine_keys(engine) for engine in sorted(ENGINES)}
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


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_every_key_of_an_engine_is_a_key_of_tensorrt_llm(engine: str) -> None:
    assert set(engine_keys(engine)) <= trtllm_keys()


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_the_aggregated_config_works_unchanged_on_every_engine(engine: str) -> None:
    path = shipped_engine_config("agg.yaml")
    config = load_engine_config(engine, engine_keys(engine), path)
    from_file = {key for key in config.settings if "agg.yaml:" in config.source(key)}
    assert {"max_batch_size", "max_num_tokens", "kv_cache_config.tokens_per_block"} <= from_file
    assert config["max_num_tokens"] >= config["max_batch_size"]
    assert config["kv_cache_config.tokens_per_block"].bit_count() == 1


def test_the_shipped_config_is_the_one_in_the_tree() -> None:
    assert shipped_engine_config("agg.yaml") == FOLDER / "agg.yaml"
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        shipped_engine_config("none.yaml")
