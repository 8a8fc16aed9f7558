"""Requests into TensorRT-LLM's words, and its handoff state into bytes: what is said, and what is not."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from trtllm_workers.engines.trtllm.api import Api
from trtllm_workers.engines.trtllm.failures import in_words, is_fatal
from trtllm_workers.engines.trtllm.handoff_state import decode_state, encode_state
from trtllm_workers.engines.trtllm.sampling import stop_ids, trtllm_sampling
from trtllm_workers.errors import EngineError
from trtllm_workers.types import EngineInfo, GuidedDecoding, GuidedKind, SamplingParams


def words(**arguments: Any) -> dict[str, Any]:
    return arguments


API = Api(
    version="1.2.1",
    llm=words,
    sampling_params=words,
    disaggregated_params=words,
    guided_decoding_params=words,
    lora_request=words,
    merge_options=lambda args, options: {**args, **options},
    request_error=RuntimeError,
)


def info(*eos: int) -> EngineInfo:
    return EngineInfo(
        engine="trtllm",
        model_path="/m",
        model_id="m",
        block_size=32,
        num_blocks=10,
        max_seq_len=100,
        max_batch_size=4,
        max_num_tokens=100,
        vocab_size=1000,
        eos_token_ids=eos,
    )


def said(*eos: int, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = trtllm_sampling(
        API, SamplingParams(**{"max_tokens": 7, **fields}), info(*eos)
    )
    return found


def test_zero_is_a_value() -> None:
    found = said(2, temperature=0.0, seed=0, top_k=0, logprobs=0)
    assert found["temperature"] == 0.0
    assert found["seed"] == 0
    assert found["top_k"] == 1  # greedy, whatever the sampler makes of a temperature of 0
    assert found["logprobs"] == 1


def test_what_would_mean_greedy_when_unset_is_always_said() -> None:
    assert said(2) == {
        "max_tokens": 7,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "detokenize": False,
        "add_special_tokens": False,
        "end_id": 2,
        "pad_id": 2,
    }


def test_every_other_field_is_passed_on_when_it_is_set() -> None:
    found = said(
        2,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        seed=-1,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        stop_token_ids=(8, 9),
        min_tokens=3,
        logprobs=5,
    )
    assert found == {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "detokenize": False,
        "add_special_tokens": False,
        "min_p": 0.1,
        "seed": (1 << 64) - 1,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "min_tokens": 3,
        "logprobs": 5,
        "end_id": 2,
        "pad_id": 2,
        "stop_token_ids": [8, 9],
    }


def test_several_eos_ids_become_one_end_and_stop_ids() -> None:
    assert said(2, 3, 4)["end_id"] == 2
    assert said(2, 3, 4)["stop_token_ids"] == [3, 4]
    assert stop_ids(SamplingParams(max_tokens=1, stop_token_ids=(9,)), info(2, 3)) == {2, 3, 9}


def test_an_ignored_eos_ends_nothing_and_a_stop_id_still_does() -> None:
    found = said(2, 3, ignore_eos=True, stop_token_ids=(9,))
    assert found["ignore_eos"] is True
    assert found["stop_token_ids"] == [9]
    ignoring = SamplingParams(max_tokens=1, ignore_eos=True, stop_token_ids=(9,))
    assert stop_ids(ignoring, info(2, 3)) == {9}


def test_a_model_without_eos_gets_an_end_that_no_token_is() -> None:
    assert (said()["end_id"], said()["pad_id"]) == (-1, 0)


@pytest.mark.parametrize(
    ("guided", "expected"),
    [
        (
            GuidedDecoding(GuidedKind.JSON_SCHEMA, '{"type":"object"}'),
            {"json": '{"type":"object"}'},
        ),
        (GuidedDecoding(GuidedKind.JSON_OBJECT), {"json_object": True}),
        (GuidedDecoding(GuidedKind.REGEX, "[ab]+"), {"regex": "[ab]+"}),
        (GuidedDecoding(GuidedKind.GRAMMAR, "root ::= [ab]"), {"grammar": "root ::= [ab]"}),
    ],
)
def test_guided_decoding(guided: GuidedDecoding, expected: dict[str, Any]) -> None:
    assert said(2, guided=guided)["guided_decoding"] == expected


def params(**changes: Any) -> SimpleNamespace:
    fields: dict[str, Any] = {
        "first_gen_tokens": [7],
        "ctx_request_id": (1 << 63) + 5,
        "opaque_state": b"\x00\xff\x80 state",
        "draft_tokens": None,
        "multimodal_embedding_handles": None,
        "mrope_position_ids_handle": None,
        "mrope_position_deltas_handle": None,
    }
    return SimpleNamespace(**{**fields, **changes})


def test_a_state_travels_as_json_and_comes_back_whole() -> None:
    state = encode_state(params(draft_tokens=[1, 2]), "1.2.1")
    assert json.loads(state)["opaque_state"] == "AP+AIHN0YXRl"
    assert decode_state(API, state, (7,)) == {
        "request_type": "generation_only",
        "first_gen_tokens": [7],
        "ctx_request_id": (1 << 63) + 5,
        "opaque_state": b"\x00\xff\x80 state",
        "draft_tokens": [1, 2],
    }


POSITIONS = {
    "mrope_position_ids_handle": {"tensor_handle": b"\x00\xff", "tensor_size": [3, 1, 9]},
    "mrope_position_deltas_handle": {"tensor_handle": "text", "tensor_size": [1]},
}


def test_positions_in_space_travel_within_one_node_only(monkeypatch: pytest.MonkeyPatch) -> None:
    state = encode_state(params(**POSITIONS), "1.2.1")
    found = decode_state(API, state, (7,))
    assert {name: found[name] for name in POSITIONS} == POSITIONS
    monkeypatch.setattr("trtllm_workers.engines.trtllm.handoff_state.node_id", lambda: "another")
    with pytest.raises(
        EngineError, match="put prefill and decode workers of this model on one node"
    ):
        decode_state(API, state, (7,))


def test_handles_of_embeddings_stay_behind() -> None:
    """They are in the KV, and generation_only takes none."""
    state = encode_state(params(multimodal_embedding_handles=[{"a": 1}]), "1.2.1")
    assert "multimodal_embedding_handles" not in decode_state(API, state, (7,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mrope_position_ids_handle": {"a": 1}}, "and not the other"),
        ({"mrope_position_deltas_handle": {"a": 1}}, "and not the other"),
        ({**POSITIONS, "mrope_position_ids_handle": {"a": object()}}, "handles that cannot travel"),
        ({"opaque_state": None}, "cache_transceiver_config.backend"),
        ({"ctx_request_id": None}, "no state to go on from"),
        ({"first_gen_tokens": []}, "no state to go on from"),
    ],
)
def test_a_state_that_could_not_be_used_elsewhere_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        encode_state(params(**changes), "1.2.1")


@pytest.mark.parametrize(
    ("state", "first", "message"),
    [
        (b"", (7,), "cannot be read"),
        (b"\xff\xfe", (7,), "cannot be read"),
        (encode_state(params(), "1.2.1").replace(b'"opaque_state"', b'"opaque"'), (7,), "opaque"),
        (encode_state(params(), "1.3.0"), (7,), "runs TensorRT-LLM 1.3.0, this one 1.2.1"),
        (encode_state(params(), "1.2.1"), (8,), r"begins with tokens \[7\], its answer with \[8\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    state: bytes, first: tuple[int, ...], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        decode_state(API, state, first)


@pytest.mark.parametrize(
    ("text", "fatal"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("NCCL error: unhandled system error", True),
        ("LLM is shutting down", True),
        ("prompt length 9000 exceeds max_num_tokens 8192", False),
        ("Guided decoding: the schema is invalid", False),
    ],
)
def test_an_error_of_the_process_is_told_from_one_of_a_request(text: str, fatal: bool) -> None:
    assert is_fatal(RuntimeError(text)) is fatal


def test_a_short_error_is_told_with_its_type() -> None:
    assert in_words(KeyError("x")) == "KeyError: 'x'"
