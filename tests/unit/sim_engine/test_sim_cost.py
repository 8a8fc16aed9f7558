from __future__ import annotations

from pathlib import Path

import pytest

from trtllm_workers.engines.sim.cost import CostModel, load_cost
from trtllm_workers.errors import ConfigError

SHIPPED = Path(__file__).parents[3] / "engine_configs" / "sim"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cost.yaml"
    path.write_text(text)
    return path


def test_the_default_is_what_the_gpu_file_says() -> None:
    assert load_cost(SHIPPED / "gpu_8b_assumed.yaml") == CostModel()


def test_free_costs_nothing() -> None:
    cost = load_cost(SHIPPED / "free.yaml")
    assert cost.base_s(prefill=True, decode=True) == 0
    assert cost.prefill_s(1000, 8192) == 0
    assert cost.decode_s(1000, 10**6) == 0


def test_10ms_costs_ten_milliseconds_per_decode_step_and_no_prefill() -> None:
    cost = load_cost(SHIPPED / "10ms.yaml")
    assert cost.base_s(prefill=False, decode=True) == 0.01
    assert cost.base_s(prefill=True, decode=True) == 0.01
    assert cost.base_s(prefill=True, decode=False) + cost.prefill_s(0, 8192) == 0
    assert cost.decode_s(2048, 10**6) == 0


def test_every_shipped_file_loads() -> None:
    files = sorted(SHIPPED.glob("*.yaml"))
    assert len(files) >= 3
    for path in files:
        assert load_cost(path).die_after_steps == 0


def test_costs_are_in_the_units_of_their_names(tmp_path: Path) -> None:
    cost = load_cost(
        written(
            tmp_path,
            "prefill: {base_ms: 2, per_token_us: 3, per_token_context_ns: 5}\n"
            "decode: {base_ms: 7, per_sequence_us: 11, per_kv_token_ns: 13}\n",
        )
    )
    assert cost.base_s(prefill=True, decode=False) == 0.002
    assert cost.base_s(prefill=True, decode=True) == 0.007
    # 10 tokens after 100 others: their mean context is 105.
    assert cost.prefill_s(100, 10) == pytest.approx(10 * (3e-6 + 105 * 5e-9))
    assert cost.decode_s(4, 1000) == pytest.approx(4 * 11e-6 + 1000 * 13e-9)


def test_the_size_of_a_block_is_no_cost_and_has_a_default_in_every_file(tmp_path: Path) -> None:
    assert load_cost(written(tmp_path, "")).kv_block_bytes == CostModel().kv_block_bytes == 64
    assert load_cost(written(tmp_path, "kv_block_bytes: 4096")).kv_block_bytes == 4096
    with pytest.raises(ConfigError, match=r":1: 'kv_block_bytes' must be 16 to .*, not 8"):
        load_cost(written(tmp_path, "kv_block_bytes: 8"))


def test_two_chunks_cost_as_much_as_one() -> None:
    cost = CostModel()
    assert cost.prefill_s(0, 300) + cost.prefill_s(300, 700) == pytest.approx(
        cost.prefill_s(0, 1000)
    )


def test_an_empty_file_costs_nothing(tmp_path: Path) -> None:
    assert load_cost(written(tmp_path, "# nothing\n")) == load_cost(SHIPPED / "free.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decode:\n  base_mss: 1\n", r":2: unknown key 'decode\.base_mss'\n.*'decode\.base_ms'"),
        ("decoed:\n  base_ms: 1\n", r":1: unknown key 'decoed'\n.*'decode'"),
        ("\nunheard_of: 1\n", r":2: unknown key 'unheard_of'\n  known keys: prefill\.base_ms"),
        ("decode: 5\n", r":1: 'decode' must hold 'key: value' lines"),
        ("- a\n- b\n", r":1: the file must hold 'key: value' lines"),
        ("decode:\n  base_ms: ten\n", r":2: 'decode\.base_ms' must be a number, not 'ten'"),
        ("decode:\n  base_ms: [1]\n", r":2: 'decode\.base_ms' must be a number, not a list"),
        ("decode:\n  base_ms:\n", r":2: 'decode\.base_ms' must be a number, not ''"),
        ("decode:\n  base_ms: true\n", r":2: 'decode\.base_ms' must be a number, not 'true'"),
        ("decode:\n  base_ms: .nan\n", r":2: 'decode\.base_ms' must be a number, not '\.nan'"),
        ("decode:\n  base_ms: !!int x\n", r":2: 'decode\.base_ms' must be a number, not 'x'"),
        ("decode:\n  base_ms: -1\n", r":2: 'decode\.base_ms' must be 0 to .*, not -1"),
        ("eos_probability: 2\n", r":1: 'eos_probability' must be 0 to 1, not 2"),
        ("die_after_steps: 1.5\n", r":1: 'die_after_steps' must be a whole number, not '1\.5'"),
        ("decode:\n  base_ms: 1\n  base_ms: 2\n", r":3: 'decode\.base_ms' is given twice"),
        ("? [a]\n: 1\n", r":1: keys must be plain names"),
        ("decode: {base_ms: 1\n", r":\d: no YAML"),
        ("a\tb: [\n", r":\d: no YAML"),
        ("\x00", r"no YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_cost(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read: No such file"):
        load_cost(tmp_path / "nowhere.yaml")
    (tmp_path / "cost.yaml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigError, match=r"cost\.yaml cannot be read: it is no UTF-8"):
        load_cost(tmp_path / "cost.yaml")
