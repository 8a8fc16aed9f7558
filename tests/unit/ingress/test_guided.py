"""Answers that must match something: what is asked for, checked and carried to a worker."""

from __future__ import annotations

import asyncio
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import CAPABILITIES, record
from tests.unit.ingress.fakes import FakeWorker, began, fakes, says
from tests.unit.ingress.roles import Worker
from tests.unit.ingress.stage import stage, text_of
from trtllm_workers.errors import RequestError
from trtllm_workers.ingress.guided import MAX_GUIDED_BYTES, fault_of
from trtllm_workers.ingress.openai import Ask, parse_chat, parse_completion
from trtllm_workers.types import FinishReason, GuidedDecoding, GuidedKind, Role, Strategy

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ANSWER = "Hello world."
UNGUIDED = tuple(name for name in CAPABILITIES if name != "guided")


def chat(**fields: Any) -> Ask:
    messages = [{"role": "user", "content": "Hi"}]
    return parse_chat(json.dumps({"model": "m", "messages": messages, **fields}).encode())


def guided(**fields: Any) -> GuidedDecoding | None:
    return chat(**fields).sampling(5, 0).guided


def refused(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    return caught.value


def json_schema(schema: Any = SCHEMA, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **more}}


@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({"response_format": {"type": "json_object"}}, GuidedKind.JSON_OBJECT, ""),
        ({"response_format": json_schema()}, GuidedKind.JSON_SCHEMA, SCHEMA),
        (
            {"response_format": json_schema(strict=True, description="d")},
            GuidedKind.JSON_SCHEMA,
            SCHEMA,
        ),
        ({"guided_json": SCHEMA}, GuidedKind.JSON_SCHEMA, SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, GuidedKind.JSON_SCHEMA, SCHEMA),
        ({"guided_json": {}}, GuidedKind.JSON_SCHEMA, {}),
        ({"guided_regex": r"\d+(a|b)"}, GuidedKind.REGEX, r"\d+(a|b)"),
        ({"guided_grammar": 'root ::= "a"'}, GuidedKind.GRAMMAR, 'root ::= "a"'),
        ({"guided_choice": ["yes", "no"]}, GuidedKind.REGEX, "(yes|no)"),
        ({"structured_outputs": {"json": SCHEMA}}, GuidedKind.JSON_SCHEMA, SCHEMA),
        ({"structured_outputs": {"regex": "a"}}, GuidedKind.REGEX, "a"),
        ({"structured_outputs": {"grammar": "g"}}, GuidedKind.GRAMMAR, "g"),
        ({"structured_outputs": {"choice": ["a", "a"]}}, GuidedKind.REGEX, "(a)"),
        ({"structured_outputs": {"json_object": True}}, GuidedKind.JSON_OBJECT, ""),
    ],
)
def test_every_way_to_ask_becomes_one_guide(
    fields: dict[str, Any], kind: GuidedKind, value: Any
) -> None:
    found = guided(**fields)
    assert found is not None
    assert found.kind is kind
    assert (json.loads(found.value) if isinstance(value, dict) else found.value) == value
    [field] = fields
    assert chat(**fields).client_field("guided") == field


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None, "guided_json": None, "structured_outputs": None},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False, "json": None}},
    ],
)
def test_what_asks_for_nothing_guides_nothing(fields: dict[str, Any]) -> None:
    assert guided(**fields) is None
    assert chat(**fields).fields == {}


def test_completions_know_the_extensions_but_not_response_format() -> None:
    body = {"model": "m", "prompt": "Hi"}
    ask = parse_completion(json.dumps({**body, "guided_choice": ["a"]}).encode())
    assert ask.sampling(1, 0).guided == GuidedDecoding(GuidedKind.REGEX, "(a)")
    with pytest.raises(RequestError, match="unknown field 'response_format'"):
        parse_completion(json.dumps({**body, "response_format": {"type": "text"}}).encode())


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_a_choice_matches_its_texts_and_nothing_else(texts: list[str]) -> None:
    found = guided(guided_choice=texts)
    assert found is not None
    matches = re.compile(found.value).fullmatch
    assert all(matches(text) for text in texts)
    assert not matches("".join(texts) + "!") or "".join(texts) + "!" in texts


def test_two_guides_are_refused_with_both_names() -> None:
    for fields, first, second in (
        ({"guided_json": {}, "guided_regex": "a"}, "guided_json", "guided_regex"),
        (
            {"response_format": {"type": "json_object"}, "guided_choice": ["a"]},
            "response_format",
            "guided_choice",
        ),
        (
            {"structured_outputs": {"regex": "a", "grammar": "b"}},
            "structured_outputs.regex",
            "structured_outputs.grammar",
        ),
    ):
        error = refused(**fields)
        assert str(error).startswith(f"{first} and {second} both say")
        assert error.param == second


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type", "not 'yaml'"),
        ({"response_format": "json"}, "response_format", "expected `object"),
        ({"response_format": {}}, "response_format.type", "is missing"),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x", "unknown"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        (
            {"response_format": {**json_schema(), "type": "json_object"}},
            "response_format.json_schema",
            "belongs to type json_schema, not json_object",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
            "is missing",
        ),
        (
            {"response_format": json_schema(["a"])},
            "response_format.json_schema.schema",
            "expected `object`",
        ),
        (
            {"response_format": json_schema({"x": "y" * MAX_GUIDED_BYTES})},
            "response_format.json_schema.schema",
            "at most 65536 are accepted",
        ),
        ({"guided_json": "[1]"}, "guided_json", "must be a JSON schema, an object"),
        ({"guided_json": "{"}, "guided_json", "is not JSON"),
        ({"guided_json": '{"a":' * 20_000}, "guided_json", "at most 65536"),
        ({"guided_json": '{"a":' * 10_000}, "guided_json", "nested too deeply"),
        ({"guided_json": 5}, "guided_json", "expected"),
        ({"guided_regex": ""}, "guided_regex", "is empty"),
        ({"guided_regex": "é" * 40_000}, "guided_regex", "has 80000 bytes"),
        ({"guided_regex": "(a"}, "guided_regex", "a '(' is never closed by a ')'"),
        ({"guided_grammar": ""}, "guided_grammar", "is empty"),
        ({"guided_choice": []}, "guided_choice", "is an empty list"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "holds an empty text"),
        ({"guided_choice": "a"}, "guided_choice", "expected `array"),
        ({"structured_outputs": {"regex": "a)"}}, "structured_outputs.regex", "closes no '('"),
        ({"structured_outputs": {"rejex": "a"}}, "structured_outputs.rejex", "unknown field"),
    ],
)
def test_a_guide_at_fault_is_refused_by_its_path(
    fields: dict[str, Any], param: str, message: str
) -> None:
    error = refused(**fields)
    assert error.param == param
    assert message in str(error)
    assert error.http_status == 400


@pytest.mark.parametrize(
    "pattern", ["(", "a)", "(a))", "[", "[a][b", "[^", "*a", "+", "?b", "a\\", "([a-z]\\)", "\\[[("]
)
def test_what_no_dialect_takes_is_refused(pattern: str) -> None:
    assert fault_of(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"\p{L}+",
        r"\d{3}-\d{4}",
        "(?<year>[0-9]+)",
        "a**",
        "[]",
        "[^](]",
        "[]()]",
        "[[:alpha:](]",
        "[a[(]]",
        "[a-z&&[^(]]",
        r"\Q(\E",
        "(?x) a # (",
        "(?#()",
        r"[\](]",
        r"\x{1F600}",
        "(?i-s:a)",
        "[z-a]",
        "^*",
        "|*",
        "a{3,1}",
    ],
)
def test_what_some_dialect_may_take_is_left_to_the_engine(pattern: str) -> None:
    assert not fault_of(pattern)


@given(st.text(r"()[]\|*+?^-{}Qx#:<a1 ", min_size=1, max_size=12))
@example("[a[b]")
@example("[a[(]")
@example("[](]")
@example("[^]]")
def test_whatever_is_refused_python_refuses_too(pattern: str) -> None:
    if not fault_of(pattern):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's, about sets that may change their meaning
        with pytest.raises(re.error):
            re.compile(pattern)


async def test_a_guide_reaches_a_worker_that_is_capable_of_it(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    without = FakeWorker(record(checkpoint, "w0", capabilities=UNGUIDED), says(tokenizer, ANSWER))
    able = FakeWorker(record(checkpoint, "w1"), says(tokenizer, ANSWER))
    async with stage(without, able) as playing:
        for _ in range(3):
            assert (await playing.chat(response_format=json_schema())).status_code == 200
        assert (await playing.complete(guided_regex="a+")).status_code == 200
    assert not without.submits
    kinds = [submit.request.sampling.guided for submit in able.submits]
    assert [kind.kind for kind in kinds if kind] == [GuidedKind.JSON_SCHEMA] * 3 + [
        GuidedKind.REGEX
    ]


async def test_a_prefill_worker_that_cannot_guide_is_passed_over(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode(ANSWER).ids
    unable = Worker(checkpoint, "p0", Role.PREFILL, info={"capabilities": UNGUIDED})
    decode = Worker(checkpoint, "d0", Role.DECODE, unable)
    decode.script = lambda worker, submit: worker.answer(submit, token_ids)
    unable.script = lambda _worker, submit: decode.answer(submit, token_ids)
    async with stage(unable, decode, strategy=Strategy.PREFILL_FIRST) as playing:
        assert (await playing.chat()).status_code == 200
        assert (await playing.chat(guided_regex="H.*")).status_code == 200
    assert [submit.request.sampling.guided for submit in unable.submits] == [None]
    assert [submit.request.sampling.guided for submit in decode.submits] == [
        GuidedDecoding(GuidedKind.REGEX, "H.*")
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [("response_format", {"type": "json_object"}), ("structured_outputs", {"regex": "a"})],
)
@pytest.mark.parametrize("streamed", [True, False])
async def test_without_a_capable_worker_the_clients_field_is_refused(
    checkpoint: Path, tokenizer: Tokenizer, field: str, value: Any, streamed: bool
) -> None:
    fake = FakeWorker(record(checkpoint, capabilities=UNGUIDED), says(tokenizer, ANSWER))
    async with stage(fake) as playing:
        response = await playing.chat(stream=streamed, **{field: value})
        unguided = await playing.chat(response_format={"type": "text"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        400,
        "unsupported_parameter",
        field,
    )
    assert error["message"] == (
        f"'{field}' is not supported by the engine that serves 'test/tiny'; guided decoding needs "
        "workers of engine trtllm whose engine config sets guided_decoding_backend"
    )
    assert unguided.status_code == 200
    assert len(fake.submits) == 1


async def test_a_fault_that_the_engine_finds_names_the_clients_field(checkpoint: Path) -> None:
    [alone] = fakes(checkpoint, 1)
    alone.script = lambda worker, submit: worker.end(
        submit.stream,
        FinishReason.ERROR,
        error_code="invalid_value",
        error_message="the grammar has no root",
        error_param="guided",
    )
    async with stage(alone) as playing:
        response = await playing.complete(guided_grammar="x")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "guided_grammar"


async def test_a_guided_answer_nobody_has_seen_starts_over_at_another_worker(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode(ANSWER).ids
    workers = fakes(checkpoint)
    async with stage(*workers) as playing:
        for streamed, told in ((False, 2), (True, 0)):
            for worker in workers:
                worker.submits.clear()
            asked = asyncio.create_task(playing.chat(stream=streamed, guided_regex="H.*"))
            used, other, submit = await began(*workers)
            if told:
                used.chunk(submit.stream, token_ids[:told])
            used.lose()
            await other.until_submits(1)
            assert other.submits[0].request == submit.request
            other.answer(other.submits[0], token_ids)
            response = await asked
            said = response.json()["choices"][0]["message"]["content"] if not streamed else None
            assert (said or text_of(response)) == ANSWER
            await playing.until(lambda: all(worker.peer is not None for worker in workers))
