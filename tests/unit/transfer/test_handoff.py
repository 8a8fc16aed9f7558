"""The states and the deadline of a handoff."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_workers.errors import HandoffExpired
from trtllm_workers.transfer.handoff import Handoff, HandoffState, Rate, handoff_timeout_s


def offer(timeout_s: float = 5.0) -> Handoff:
    return Handoff("r1", "decode-0", 2, 2048, offered_s=100.0, timeout_s=timeout_s)


def test_a_fetch_in_time_and_a_release_end_it() -> None:
    handoff = offer()
    handoff.fetch(now_s=104.9)
    assert handoff.state is HandoffState.FETCHING
    assert handoff.release("fetched")
    assert (handoff.state, handoff.cause) == (HandoffState.RELEASED, "fetched")


def test_fetch_after_the_deadline_names_the_request_the_peer_and_the_wait() -> None:
    handoff = offer(timeout_s=5.0)
    with pytest.raises(HandoffExpired, match=r"r1: 2 KV blocks waited 6\.0 s for .*decode-0"):
        handoff.fetch(now_s=106.0)
    assert handoff.state is HandoffState.EXPIRED


def test_a_release_after_the_deadline_says_that_the_pins_were_gone() -> None:
    handoff = offer()
    handoff.fetch(now_s=101.0)
    assert handoff.expire(now_s=105.0)
    assert not handoff.release("fetched")
    assert (handoff.state, handoff.cause) == (HandoffState.EXPIRED, "deadline")


def test_it_does_not_expire_early_nor_twice() -> None:
    handoff = offer()
    assert not handoff.expire(now_s=104.999)
    assert handoff.expire(now_s=105.0)
    assert not handoff.expire(now_s=106.0)


@given(
    num_bytes=st.integers(0, 1 << 40),
    rate=st.floats(0, 1e12),
    least=st.floats(0.1, 10),
    most=st.floats(10, 1000),
)
def test_the_deadline_grows_with_the_bytes_between_its_bounds(
    num_bytes: int, rate: float, least: float, most: float
) -> None:
    timeout_s = handoff_timeout_s(num_bytes, rate, min_timeout_s=least, max_timeout_s=most)
    assert least <= timeout_s <= most
    more = handoff_timeout_s(2 * num_bytes, rate, min_timeout_s=least, max_timeout_s=most)
    assert more >= timeout_s


def test_the_deadline_of_a_gigabyte_at_a_gigabyte_a_second() -> None:
    assert handoff_timeout_s(10**9, 1e9, min_timeout_s=5, max_timeout_s=120) == 15.0
    assert handoff_timeout_s(10**9, 0.0, min_timeout_s=5, max_timeout_s=120) == 5.0
    assert handoff_timeout_s(10**12, 1e9, min_timeout_s=5, max_timeout_s=120) == 120.0


def test_a_rate_follows_large_transfers_and_forgets_small_ones() -> None:
    rate = Rate()
    rate.note(0, 0.0)
    assert rate.bytes_per_s == 0.0
    rate.note(1000, 0.001)
    assert (rate.bytes_per_s, rate.telling) == (1e6, False)
    rate.note(10**8, 0.1)
    assert (rate.bytes_per_s, rate.telling) == (1e9, True)
    rate.note(1000, 0.001)
    assert rate.bytes_per_s == 1e9
    rate.note(2 * 10**8, 0.1)
    assert rate.bytes_per_s == pytest.approx(1.3e9)
