from __future__ import annotations

import pytest

from trtllm_workers.config.schema import trtllm_keys, trtllm_schema


def test_keys_of_1_2_1_hold_what_its_arguments_hold() -> None:
    keys = trtllm_keys("1.2.1")
    assert {
        "max_batch_size",
        "kv_cache_config",
        "kv_cache_config.tokens_per_block",
        "cache_transceiver_config.kv_transfer_timeout_ms",
        "cuda_graph_config.enable_padding",
        "scheduler_config.dynamic_batch_config.enable_batch_size_tuning",
        "moe_config.load_balancer.num_slots",
    } <= keys
    assert not {"enable_graph_padding", "pytorch_backend_config", "mpi_session"} & keys


def test_sections_of_several_shapes_hold_the_union_of_their_keys() -> None:
    assert {
        "speculative_config.decoding_type",
        "speculative_config.num_nextn_predict_layers",
        "speculative_config.eagle3_one_model",
        "speculative_config.speculative_model_dir",
        "sparse_attention_config.algorithm",
        "sparse_attention_config.index_topk",
    } <= trtllm_keys()


def test_keys_with_free_content_take_any_key_below() -> None:
    schema = trtllm_schema()
    assert schema.knows("env_overrides.NCCL_DEBUG")
    assert schema.knows("cp_config.cp_type")
    assert not schema.knows("kv_cache_config.no_such_key")


def test_renamed_keys_are_no_keys_any_more() -> None:
    schema = trtllm_schema()
    assert not set(schema.renamed) & set(schema.keys)


def test_every_key_stands_in_a_section_that_is_a_key() -> None:
    keys = trtllm_keys()
    assert all(key.rpartition(".")[0] in keys for key in keys if "." in key)


def test_an_undescribed_version_is_refused() -> None:
    with pytest.raises(LookupError, match=r"TensorRT-LLM 9\.9"):
        trtllm_keys("9.9")
