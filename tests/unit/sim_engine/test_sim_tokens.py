from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trtllm_workers.engines.sim.tokens import SEGMENT_TOKENS, Continuation, Vocabulary

WORDS = tuple(range(300, 1000))
EOS = 2
VOCABULARY = Vocabulary("model", WORDS, EOS)
PROMPTS = st.lists(st.integers(0, 1023), min_size=1, max_size=3 * SEGMENT_TOKENS)


def continued(
    prompt: list[int], count: int, vocabulary: Vocabulary = VOCABULARY, **options: Any
) -> list[int]:
    continuation = Continuation(vocabulary, prompt, **options)
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        if continuation.extend(tokens, len(prompt) + count) is not None:
            break
    return tokens[len(prompt) :]


@given(PROMPTS, st.integers(1, 200), st.integers(0, 200))
def test_a_continuation_goes_on_from_any_prefix(prompt: list[int], count: int, cut: int) -> None:
    tokens = continued(prompt, count)
    cut = min(cut, count - 1)
    assert len(tokens) == count
    assert continued(prompt + tokens[:cut], count - cut) == tokens[cut:]


@given(PROMPTS, st.integers(0, 1023), st.data())
def test_any_changed_token_changes_the_continuation(
    prompt: list[int], token: int, draw: st.DataObject
) -> None:
    index = draw.draw(st.integers(0, len(prompt) - 1))
    changed = [*prompt[:index], token, *prompt[index + 1 :]]
    assert (continued(changed, 16) == continued(prompt, 16)) == (token == prompt[index])


def test_other_models_and_seeds_continue_otherwise() -> None:
    prompt = list(range(100))
    answers = [
        continued(prompt, 20),
        continued(prompt, 20, Vocabulary("other", WORDS, EOS)),
        *(continued(prompt, 20, seed=seed) for seed in (0, 1, -1, 2**64)),
    ]
    assert len({tuple(answer) for answer in answers}) == len(answers)
    assert continued(prompt, 20, seed=1) == continued(prompt, 20, seed=1)


def test_words_are_spread_evenly() -> None:
    counts = Counter(continued([1, 2, 3], 70_000))
    assert set(counts) == set(WORDS)
    assert max(counts.values()) < 2 * 100
    assert min(counts.values()) > 100 / 2


@given(PROMPTS, st.integers(0, 90))
def test_stop_ids_end_the_sequence_from_min_tokens_on(prompt: list[int], min_tokens: int) -> None:
    stops = frozenset(WORDS[::7])
    tokens = list(prompt)
    continuation = Continuation(
        VOCABULARY, prompt, stop_ids=stops, stop_from=len(prompt) + min_tokens
    )
    stop = None
    while stop is None and len(tokens) < len(prompt) + 500:
        stop = continuation.extend(tokens, len(prompt) + 500)
    assert stop == len(tokens) - 1
    answer = tokens[len(prompt) :]
    assert answer[-1] in stops
    assert not stops & set(answer[:-1])
    assert len(answer) > min_tokens


def test_min_tokens_is_kept_when_every_word_is_a_stop_id_but_one() -> None:
    answer = continued([1], 50, stop_ids=frozenset(WORDS[1:]), stop_from=1 + 40)
    assert answer[:40] == [WORDS[0]] * 40


def test_eos_comes_with_its_probability() -> None:
    lengths = [len(continued([seed, 5, 6], 500, eos_probability=0.1)) for seed in range(1000)]
    assert 9 < sum(lengths) / len(lengths) < 11  # the mean of a geometric distribution: 10
    assert continued([1], 10, eos_probability=1.0, stop_from=1) == [EOS]
    assert len(continued([1], 10, Vocabulary("model", WORDS, None), eos_probability=1.0)) == 10
