from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from trtllm_workers.config.disaggregation import require_same_blocks
from trtllm_workers.config.engine_config import load_engine_config, shown_value
from trtllm_workers.config.schema import trtllm_keys, trtllm_schema
from trtllm_workers.config.shipped import shipped_engine_config
from trtllm_workers.config.yaml_source import YamlMapping, YamlValue, load_yaml
from trtllm_workers.engines.registry import KEYED_ENGINES, engine_keys

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "engine_configs"
README = FOLDER / "README.md"
GUIDES = ROOT / "docs" / "guides"
LOAD_BALANCER = "deepseek_r1/wide_ep/eplb.yaml"
# Every engine config there is; cost models of the sim engine and the load balancer's file are none.
CONFIGS = sorted(
    name
    for path in FOLDER.rglob("*.yaml")
    if not (name := path.relative_to(FOLDER).as_posix()).startswith("sim/")
    and name != LOAD_BALANCER
)
PREFILL = [name for name in CONFIGS if "prefill" in name]
DECODE = [name for name in CONFIGS if "decode" in name]
PAIRS = [pytest.param(name, name.replace("prefill", "decode"), id=name) for name in PREFILL]
# Where the KV of a pair, or what is guessed from it, would differ if these did.
EQUAL_IN_A_PAIR = (
    "kv_cache_config.tokens_per_block",
    "kv_cache_config.dtype",
    "kv_cache_config.enable_block_reuse",
    "cache_transceiver_config",
    "speculative_config",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "max_seq_len",
)
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


def plain(value: YamlValue) -> Any:
    """Return a YAML value without positions."""
    if isinstance(value, YamlMapping):
        return {item.key: plain(item.value) for item in value.items}
    return [plain(one) for one in value] if isinstance(value, tuple) else value


def read(name: str) -> dict[str, Any]:
    """Return a config as TensorRT-LLM gets it."""
    return dict(plain(load_yaml(FOLDER / name)))


def dotted(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every key of a config by its dotted name, sections included."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found[prefix + key] = value
        if isinstance(value, dict):
            found |= dotted(value, f"{prefix}{key}.")
    return found


def tokens_per_stream(config: dict[str, Any]) -> int:
    """Return the tokens that one stream needs of a decode step: its own and those guessed ahead."""
    guess = config.get("speculative_config") or {}
    return 1 + int(guess.get("num_nextn_predict_layers", guess.get("max_draft_len", 0)))


def largest_graph(config: dict[str, Any]) -> int:
    graphs = config["cuda_graph_config"] or {}
    return max(
        int(size) for size in (*graphs.get("batch_sizes", ()), graphs.get("max_batch_size", 0))
    )


def test_the_readme_names_every_file() -> None:
    text = README.read_text(encoding="utf-8")
    assert [name for name in [*CONFIGS, LOAD_BALANCER] if f"`{name}`" not in text] == []


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


def test_there_is_a_decode_config_for_every_prefill_config() -> None:
    assert sorted(str(param.values[1]) for param in PAIRS) == DECODE
    assert len(PAIRS) >= 8


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_holds_only_keys_of_tensorrt_llm(name: str) -> None:
    schema = trtllm_schema()
    assert [key for key in dotted(read(name)) if not schema.knows(key)] == []


def test_the_load_balancer_file_says_what_the_configs_beside_it_say() -> None:
    inline = [read(name)["moe_config"]["load_balancer"] for name in CONFIGS if "/wide_ep/" in name]
    assert inline == [read(LOAD_BALANCER)] * 3


@pytest.mark.parametrize("name", [*CONFIGS, LOAD_BALANCER])
def test_every_number_has_a_comment(name: str) -> None:
    bare = []
    for paragraph in (FOLDER / name).read_text(encoding="utf-8").split("\n\n"):
        is_explained = False
        for line in paragraph.splitlines():
            is_explained |= line.lstrip().startswith("#")
            if re.search(r":\s*\[?\d", line.split("#")[0]) and not is_explained:
                bare.append(line)
    assert bare == []


@pytest.mark.parametrize("name", [*CONFIGS, LOAD_BALANCER])
def test_the_head_says_version_and_workload(name: str) -> None:
    head = (FOLDER / name).read_text(encoding="utf-8").split("\n\n")[0]
    if "/" in name or name.endswith("encode.yaml"):
        assert "TensorRT-LLM" in head
        assert "1.2.1" in head
        assert "ISL" in head
        assert "OSL" in head
        assert re.search(r"\bGPUs?\b", head)
    assert all(line.startswith("#") for line in head.splitlines())


@pytest.mark.parametrize(("prefill", "decode"), PAIRS)
def test_a_pair_agrees_where_it_must(prefill: str, decode: str) -> None:
    one, other = dotted(read(prefill)), dotted(read(decode))
    assert {key: one.get(key) for key in EQUAL_IN_A_PAIR} == {
        key: other.get(key) for key in EQUAL_IN_A_PAIR
    }


@pytest.mark.parametrize("name", [*PREFILL, *DECODE])
def test_a_handoff_has_a_transport_a_deadline_and_room_for_the_longest_prompt(name: str) -> None:
    config = read(name)
    transceiver = config["cache_transceiver_config"]
    assert transceiver["backend"] == "UCX"
    # Above a minute a lost handoff holds memory for long; well below, waiting for decode is cut off.
    assert 30_000 <= transceiver["kv_transfer_timeout_ms"] <= 120_000
    assert transceiver["max_tokens_in_buffer"] >= config.get("max_seq_len", 8192)
    # TensorRT-LLM ends itself when the buffer is no whole number of blocks.
    assert transceiver["max_tokens_in_buffer"] % config["kv_cache_config"]["tokens_per_block"] == 0
    assert config["kv_cache_config"].get("free_gpu_memory_fraction", 0) <= 0.9


@pytest.mark.parametrize("name", PREFILL)
def test_a_prefill_config_neither_overlaps_nor_records_graphs(name: str) -> None:
    config = read(name)
    assert config["disable_overlap_scheduler"] is True
    assert config["cuda_graph_config"] is None


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in PREFILL])
def test_the_largest_graph_fits_into_batch_and_step(name: str) -> None:
    config = read(name)
    largest = largest_graph(config)
    assert largest <= config["max_batch_size"]
    assert largest * tokens_per_stream(config) <= config["max_num_tokens"]
    assert config["max_batch_size"] * tokens_per_stream(config) <= config["max_num_tokens"]


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.endswith("encode.yaml")])
def test_prompts_longer_than_a_step_are_computed_in_pieces(name: str) -> None:
    assert read(name)["enable_chunked_prefill"] is True


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_are_spread_over_ranks_that_there_are(name: str) -> None:
    config = read(name)
    ranks, experts = (
        config.get(key, 1) for key in ("tensor_parallel_size", "moe_expert_parallel_size")
    )
    assert ranks % experts == 0
    balancer = config.get("moe_config", {}).get("load_balancer")
    if balancer is not None:
        assert balancer["num_slots"] >= 256
        assert balancer["num_slots"] % experts == 0


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.endswith("encode.yaml")])
def test_a_config_can_be_rehearsed_on_the_sim_engine(name: str) -> None:
    config = load_engine_config("sim", engine_keys("sim"), FOLDER / name)
    assert config["max_num_tokens"] == read(name)["max_num_tokens"]


@pytest.mark.parametrize(
    "document",
    [ROOT / "launch" / "README.md", README, *sorted(GUIDES.glob("*.md"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:engine_configs|launch)/[\w./]+\.(?:yaml|sh|md))", text))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_files_that_a_config_names_exist(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:engine_configs|launch|docs|multinode)/[\w./]+\.\w+)", text))
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []
