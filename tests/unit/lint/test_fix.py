"""Old keys and typing mistakes mended in place: what was right stays as it was, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_workers.errors import ConfigError
from trtllm_workers.lint.fix import fix_file, fix_text
from trtllm_workers.lint.migrate import migrated, old_keys
from trtllm_workers.lint.problem import Severity
from trtllm_workers.lint.read import parse_document
from trtllm_workers.types import Role


def fixed(text: str) -> str:
    return fix_text(text, "a.yaml")[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("kv_cache_dtype: fp8  # small\n", "kv_cache_config:\n  dtype: fp8  # small\n"),
        (
            "kv_cache_config:\n  # why\n  free_gpu_memory_fraction: 0.8\nkv_cache_dtype: fp8\n",
            "kv_cache_config:\n  # why\n  free_gpu_memory_fraction: 0.8\n  dtype: fp8\n",
        ),
        (
            "kv_cache_dtype: fp8\nx: 1\nkv_cache_config:\n    max_tokens: 4\n# end\n",
            "x: 1\nkv_cache_config:\n    max_tokens: 4\n    dtype: fp8\n# end\n",
        ),
        ("enable_overlap_scheduler: true # a\n", "disable_overlap_scheduler: false  # a\n"),
        ("enable_overlap_scheduler: off\n", "disable_overlap_scheduler: true\n"),
        ("use_cuda_graph: false\n", "cuda_graph_config: null\n"),
        (
            "cuda_graph_config: # on\n  use_cuda_graph: true\n  batch_sizes: [1, 2]\nx: 1\n",
            "cuda_graph_config: # on\n  batch_sizes: [1, 2]\nx: 1\n",
        ),
        ("cuda_graph_config:\n  use_cuda_graph: yes\n", "cuda_graph_config: {}\n"),
        (
            "cuda_graph_config:\n  batch_sizes: [1]\n  use_cuda_graph: false\nx: 1\n",
            "cuda_graph_config: null\nx: 1\n",
        ),
        (
            "use_cuda_graph: false\ncuda_graph_padding_enabled: true\nx: 1\n",
            "cuda_graph_config: null\nx: 1\n",
        ),
        (
            "use_cuda_graph: true\ncuda_graph_batch_sizes:\n- 1\n- 2\ncuda_graph_padding_enabled: yes\n",
            "cuda_graph_config:\n  enable_padding: yes\n  batch_sizes:\n  - 1\n  - 2\n",
        ),
        (
            "cuda_graph_config:\n  enable_graph_padding: true\n  cuda_graph_batch_sizes: [1]\n",
            "cuda_graph_config:\n  enable_padding: true\n  batch_sizes: [1]\n",
        ),
        (
            "moe_backend: WIDEEP\nmoe_load_balancer: /a.yaml\n",
            "moe_config:\n  backend: WIDEEP\n  load_balancer: /a.yaml\n",
        ),
        (
            "speculative_config:\n  decoding_type: Eagle\n  pytorch_weights_path: /m\n",
            "speculative_config:\n  decoding_type: Eagle\n  speculative_model: /m\n",
        ),
        (
            "a: 1\npytorch_backend_config:\n  # inside\n  enable_overlap_scheduler: false\n"
            "  kv_cache_dtype: fp8\n\nb: 2\n",
            "a: 1\n# inside\ndisable_overlap_scheduler: true\nkv_cache_config:\n  dtype: fp8\n\nb: 2\n",
        ),
    ],
)
def test_an_old_key_goes_where_it_belongs_now(old: str, new: str) -> None:
    assert fixed(old) == new
    assert fixed(new) == new  # a second time changes nothing


def test_what_stands_there_already_stays() -> None:
    text = "kv_cache_config:\n  dtype: auto\nkv_cache_dtype: fp8\n"
    assert fixed(text) == "kv_cache_config:\n  dtype: auto\n"


@pytest.mark.parametrize(
    "text",
    [
        "cuda_graph_config: {enable_graph_padding: true}\n",
        "kv_cache_dtype: fp8\nkv_cache_config: {max_tokens: 4}\n",
        "moe_backend: TRITON\nmoe_config: {max_num_tokens: 64}\n",
        "use_cuda_graph: perhaps\n",
        "x: 1\npytorch_backend_config:\n  x: 2\n",
    ],
)
def test_what_cannot_be_mended_by_lines_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml|must be true or false"):
        fix_file(path)
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_spelling_and_case_are_mended_in_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "# head\nmax_num_token: 8  # eight\nmoe_config:\n  backend: WIFEEP # wide\n"
        "cache_transceiver_config:\n  backend: default\n"
    )
    changes = fix_file(path)
    assert path.read_text() == (
        "# head\nmax_num_tokens: 8  # eight\nmoe_config:\n  backend: WIDEEP # wide\n"
        "cache_transceiver_config:\n  backend: DEFAULT\n"
    )
    assert len(changes) == 3
    assert fix_file(path) == []


def test_line_ends_and_mode_of_the_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"kv_cache_dtype: fp8\r\n")
    path.chmod(0o640)
    fix_file(path)
    assert path.read_bytes() == b"kv_cache_config:\r\n  dtype: fp8\r\n"
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_file_that_is_right_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("max_batch_size: 8\n")
    before = path.stat().st_mtime_ns
    assert fix_file(path) == []
    assert path.stat().st_mtime_ns == before


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.yaml").write_text("kv_cache_dtype: fp8\n")
    (tmp_path / "link.yaml").symlink_to("real.yaml")
    fix_file(tmp_path / "link.yaml")
    assert (tmp_path / "link.yaml").is_symlink()
    assert "dtype: fp8" in (tmp_path / "real.yaml").read_text()


_OLD: dict[str, st.SearchStrategy[Any]] = {
    "enable_overlap_scheduler": st.booleans(),
    "use_cuda_graph": st.booleans(),
    "cuda_graph_padding_enabled": st.booleans(),
    "cuda_graph_batch_sizes": st.lists(st.integers(1, 9), min_size=1, max_size=3),
    "kv_cache_dtype": st.sampled_from(["fp8", "auto"]),
    "moe_backend": st.sampled_from(["WIDEEP", "CUTLASS"]),
    "max_batch_size": st.integers(1, 9),
    "kv_cache_config": st.fixed_dictionaries({"max_tokens": st.integers(1, 9)}),
    "moe_config": st.fixed_dictionaries({"max_num_tokens": st.integers(1, 9)}),
}


@settings(deadline=None)
@given(
    keys=st.lists(st.sampled_from(sorted(_OLD)), unique=True, max_size=7),
    nested=st.integers(0, 7),
    data=st.data(),
)
def test_any_mixture_of_old_keys_means_what_it_meant(
    keys: list[str], nested: int, data: st.DataObject
) -> None:
    config: dict[str, Any] = {}
    inside: dict[str, Any] = {}
    for index, key in enumerate(keys):
        (inside if index < nested else config)[key] = data.draw(_OLD[key])
    if inside:
        config["pytorch_backend_config"] = inside
    new = fixed(yaml.safe_dump(config))
    assert (yaml.safe_load(new) or {}) == migrated(config)
    assert old_keys(yaml.safe_load(new) or {}) == []
    problems = parse_document(new, "a.yaml", Role.AGGREGATED)[1]
    assert not [one for one in problems if one.severity is Severity.ERROR and one.rule == "old-key"]
