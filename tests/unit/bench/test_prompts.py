from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.bench.fake_server import TEMPLATE_TOKENS, FakeServer
from trtllm_workers.bench.client import Client
from trtllm_workers.bench.connection import Target
from trtllm_workers.bench.prompts import Prompts, Words, make_prompts
from trtllm_workers.bench.workload import Workload
from trtllm_workers.demo import demo_model_path
from trtllm_workers.errors import ConfigError

Serve = Callable[[FakeServer], FakeServer]
WORDS = Words({"a": 1, "b": 1, "long": 3}, 6, 5)


def content(body: bytes) -> str:
    return str(json.loads(body)["messages"][0]["content"])


async def made(workload: Workload, tokenizer: Path | None = None) -> tuple[Prompts, list[str]]:
    async with Client(Target("http://h:1"), timeout_s=5) as client:
        return await make_prompts(client, "m", workload, tokenizer)


async def test_prompts_have_the_tokens_the_server_counts(serve: Serve) -> None:
    server = serve(FakeServer(odd_words=("people", "the", "a")))
    prompts, notes = await made(Workload(isl=300, osl=7))
    assert notes == []
    texts = [content(body) for body in prompts.bodies("level", 20)]
    assert {TEMPLATE_TOKENS + server.tokens(text) for text in texts} == {300}
    assert len(set(texts)) == 20
    assert len({text.split()[1:8] == texts[0].split()[1:8] for text in texts}) == 2
    body = json.loads(prompts.bodies("level", 1)[0])
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"]) == (7, 7, True)


async def test_equal_seeds_and_levels_give_equal_prompts_and_others_do_not(serve: Serve) -> None:
    serve(FakeServer())
    one, _ = await made(Workload(isl=50, osl=7, seed=1))
    same, _ = await made(Workload(isl=50, osl=7, seed=1))
    other, _ = await made(Workload(isl=50, osl=7, seed=2))
    assert one.bodies("a", 3) == same.bodies("a", 3)
    assert one.bodies("a", 1) != one.bodies("b", 1)
    assert one.bodies("a", 1) != other.bodies("a", 1)


async def test_the_shared_prefix_is_shared_and_the_rest_is_not(serve: Serve) -> None:
    serve(FakeServer())
    prompts, _ = await made(Workload(isl=100, osl=7, shared_prefix=40))
    one, other = (content(body).split() for body in prompts.bodies("level", 2))
    assert one[:41] == other[:41]
    assert one[41:] != other[41:]


async def test_a_server_without_min_tokens_or_ignore_eos_gets_what_it_takes(serve: Serve) -> None:
    serve(FakeServer(refused=("min_tokens",)))
    prompts, notes = await made(Workload(isl=50, osl=7))
    assert (prompts.ending(), notes) == ({"ignore_eos": True}, [])
    serve(FakeServer(refused=("min_tokens", "ignore_eos")))
    prompts, notes = await made(Workload(isl=50, osl=7))
    assert prompts.ending() == {}
    assert "refuses ignore_eos" in notes[0]


async def test_a_tokenizer_that_does_not_fit_the_server_is_not_believed(serve: Serve) -> None:
    server = serve(FakeServer(odd_words=()))
    server.tokens = lambda text: 2 * len(text.split())  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="too few words"):
        await made(Workload(isl=100, osl=7), demo_model_path())


async def test_words_of_a_tokenizer_spare_most_questions(serve: Serve) -> None:
    server = serve(FakeServer())
    prompts, notes = await made(Workload(isl=100, osl=7), demo_model_path())
    assert notes == []
    assert len(prompts.words.tokens) > 12
    assert len(server.bodies) < 10


async def test_a_tokenizer_that_cannot_be_read_is_named(serve: Serve, tmp_path: Path) -> None:
    serve(FakeServer())
    with pytest.raises(ConfigError, match=r"--tokenizer: .*tokenizer.json cannot be read"):
        await made(Workload(isl=100, osl=7), tmp_path)


def test_words_of_several_tokens_still_fill_exactly() -> None:
    import random

    for tokens in range(1, 40):
        text = WORDS.text(tokens, random.Random(tokens))
        assert sum(WORDS.tokens[word] for word in text.split()) == tokens


def test_too_short_a_prompt_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"--isl 10 is too short: the chat template has 6 tokens"):
        Prompts("m", Workload(isl=10, osl=1, shared_prefix=4), WORDS, ())
