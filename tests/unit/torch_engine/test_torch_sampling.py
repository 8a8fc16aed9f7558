"""Every sampling parameter has its effect, and no row sees another."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from tests.unit.torch_engine.driver import request_of
from trtllm_workers.blocks import root_hash
from trtllm_workers.engines.torch.sampling import Sampled, sample, uniform
from trtllm_workers.engines.torch.sequence import Sequence

VOCAB = 50
EOS = (1,)


def sequence_of(*output: int, prompt: tuple[int, ...] = (9,), **sampling: Any) -> Sequence:
    sequence = Sequence(request_of(prompt, 100, **sampling), 0, root_hash("m"), 16)
    for token in output:
        sequence.append(token)
    return sequence


def one(logits: torch.Tensor, **sampling: Any) -> Sampled:
    return sample(logits.unsqueeze(0), [sequence_of(**sampling)], EOS)[0]


def drawn(logits: torch.Tensor, count: int = 2000, **sampling: Any) -> Counter[int]:
    """Tokens that ``count`` seeds draw."""
    rows = [sequence_of(**{"temperature": 1.0, **sampling, "seed": s}) for s in range(count)]
    return Counter(found.token for found in sample(logits.expand(count, -1), rows, EOS))


@pytest.fixture
def logits() -> torch.Tensor:
    """Falling logits: token 0 is the best, each next half as probable."""
    return -math.log(2) * torch.arange(VOCAB, dtype=torch.float32)


def test_greedy_takes_the_best_and_the_first_of_equals() -> None:
    logits = torch.zeros(VOCAB)
    assert one(logits).token == 0
    logits[30] = logits[20] = 1
    assert one(logits).token == 20
    assert one(logits, temperature=1e-40).token in (20, 30)


def test_draws_follow_the_probabilities(logits: torch.Tensor) -> None:
    counts = drawn(logits)
    for token in range(5):
        expected = 0.5 ** (token + 1)
        assert counts[token] / 2000 == pytest.approx(expected, abs=4 * math.sqrt(expected / 2000))


def test_temperature_sharpens_and_flattens(logits: torch.Tensor) -> None:
    cold, warm, hot = (drawn(logits, temperature=t)[0] for t in (0.3, 1.0, 3.0))
    assert cold > 1700 > warm > 900 > hot > 200


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        ({"top_k": 1}, 1),
        ({"top_k": 3}, 3),
        ({"top_p": 1e-9}, 1),
        ({"top_p": 0.5}, 1),
        ({"top_p": 0.74}, 2),
        ({"top_p": 0.8}, 3),
        ({"min_p": 1.0}, 1),
        ({"min_p": 0.2}, 3),
        ({"top_k": 4, "min_p": 0.2}, 3),
        # top_p counts what top_k left: 4/7, 2/7, 1/7.
        ({"top_k": 3, "top_p": 0.6}, 2),
    ],
)
def test_a_cut_leaves_exactly_the_best(
    logits: torch.Tensor, sampling: dict[str, float], allowed: int
) -> None:
    assert set(drawn(logits, 500, **sampling)) == set(range(allowed))


def test_cuts_are_the_same_in_a_large_vocabulary() -> None:
    shuffled = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    flat = torch.zeros(5000)  # top_p 0.5 reaches beyond the candidates
    flat[shuffled] = 1e-4 * torch.arange(5000)
    sums = torch.softmax(flat.double(), -1).sort(descending=True).values.cumsum(-1)
    kept = set(flat.topk(int((sums < 0.5).sum()) + 1).indices.tolist())
    found = set(drawn(flat, 3000, top_p=0.5))
    assert found <= kept
    assert len(found) > 1100
    for limit in (1500, 2):
        best = set(flat.topk(limit).indices.tolist())
        found = set(drawn(flat, 1000, top_k=limit))
        assert found <= best
        assert len(found) > min(limit - 1, 400)


def test_a_seed_gives_the_same_token_at_a_position_and_another_elsewhere() -> None:
    flat = torch.zeros(VOCAB)
    tokens = [one(flat, temperature=1.0, seed=5).token for _ in range(3)]
    assert len(set(tokens)) == 1
    assert len({one(flat, temperature=1.0, seed=seed).token for seed in range(20)}) > 10
    later = [
        sample(flat.unsqueeze(0), [sequence_of(*[3] * n, temperature=1.0, seed=5)], EOS)[0].token
        for n in range(20)
    ]
    assert len(set(later)) > 10
    drawn_seeds = {sequence_of(temperature=1.0, seed=None).seed for _ in range(10)}
    assert len(drawn_seeds) == 10


def test_uniform_numbers_are_uniform_and_take_any_seed() -> None:
    numbers = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert all(0 <= number < 1 for number in numbers)
    assert sum(numbers) / len(numbers) == pytest.approx(0.5, abs=0.01)
    assert 900 < sum(number < 0.1 for number in numbers) < 1100
    assert uniform(-1, 0) != uniform(2**70, 0)


def test_penalties_count_what_they_say(logits: torch.Tensor) -> None:
    logits = logits + 10  # all of the first positive
    row = logits.unsqueeze(0)

    def token(prompt: tuple[int, ...], *output: int, **sampling: float) -> int:
        return sample(row, [sequence_of(*output, prompt=prompt, **sampling)], EOS)[0].token

    assert token((0,), repetition_penalty=2.0) == 1  # the prompt counts
    assert token((9,), 0, repetition_penalty=2.0) == 1
    assert token((0,), presence_penalty=1.0) == 0  # the prompt does not
    assert token((9,), 0, presence_penalty=1.0) == 1
    assert token((9,), 0, presence_penalty=0.5) == 0
    assert token((9,), 0, frequency_penalty=0.5) == 0
    assert token((9,), 0, 0, frequency_penalty=0.5) == 1  # twice
    assert token((9,), 0, 0, presence_penalty=0.5) == 0
    assert token((9,), 4, presence_penalty=-9.0) == 4
    negative = (logits - 100).unsqueeze(0)
    assert sample(negative, [sequence_of(prompt=(0,), repetition_penalty=2.0)], EOS)[0].token == 1


def test_logit_bias_moves_and_bans(logits: torch.Tensor) -> None:
    assert one(logits, logit_bias=((40, 100.0),)).token == 40
    assert one(logits, logit_bias=((0, -math.inf),)).token == 1


def test_min_tokens_bans_eos_and_stop_ids_until_then() -> None:
    logits = torch.zeros(VOCAB)
    logits[1], logits[2], logits[3] = 3, 2, 1
    row = logits.unsqueeze(0)

    def token(*output: int, **sampling: Any) -> int:
        asked = {"ignore_eos": False, "min_tokens": 2, "stop_token_ids": (2,), **sampling}
        return sample(row, [sequence_of(*output, **asked)], EOS)[0].token

    assert token() == 3
    assert token(5) == 3
    assert token(5, 5) == 1
    assert token(ignore_eos=True) == 1  # eos is a token like others then
    assert token(stop_token_ids=()) == 2


def test_logprobs_are_of_the_raw_distribution(logits: torch.Tensor) -> None:
    expected = torch.log_softmax(logits.double(), -1)
    found = one(
        logits, logprobs=2, temperature=0.1, top_k=1, logit_bias=((7, 100.0),), seed=1
    ).logprob
    assert found is not None
    assert found.token_id == 7
    assert found.logprob == pytest.approx(float(expected[7]))
    assert [token for token, _value in found.top] == [0, 1]
    assert [value for _t, value in found.top] == pytest.approx(expected[:2].tolist())
    chosen_only = one(logits, logprobs=0).logprob
    assert chosen_only is not None
    assert chosen_only.top == []
    assert one(logits).logprob is None


def test_a_row_does_not_depend_on_its_mates() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(24, 3000, generator=generator)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "seed": 1},
        {"temperature": 1.2, "top_p": 0.7, "seed": 2},
        {"temperature": 1.0, "top_p": 0.999, "seed": 3},
        {"temperature": 0.9, "top_k": 40, "min_p": 0.05, "seed": 4},
        {"temperature": 1.0, "top_k": 2000, "logprobs": 3, "seed": 5},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
        {"logit_bias": ((5, 3.0),), "min_tokens": 4, "stop_token_ids": (9,)},
    ]
    sequences = [sequence_of(3, 3, 8, **kinds[i % len(kinds)]) for i in range(24)]
    together = sample(logits, sequences, EOS)
    for row, found in enumerate(together):
        assert sample(logits[row : row + 1], sequences[row : row + 1], EOS) == [found]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_row_without_a_choice_is_an_error_of_that_row(
    logits: torch.Tensor, sampling: dict[str, Any], value: float
) -> None:
    rows = torch.stack((logits, torch.full((VOCAB,), value), logits))
    found = sample(rows, [sequence_of(seed=1, **sampling) for _ in range(3)], EOS)
    assert "no token can be chosen" in (found[1].error or "")
    assert found[0].error is found[2].error is None
    assert found[0].token == found[2].token
