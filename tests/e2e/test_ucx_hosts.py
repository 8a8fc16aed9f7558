"""KV over ucx between hosts without RDMA: right tokens, and nobody ends because somebody else did."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest

from tests.e2e.harness import Process, Workbench
from tests.e2e.hosts import Network, needs_hosts, network
from tests.e2e.rehearsal import Rehearsal, within

pytestmark = [
    needs_hosts,
    pytest.mark.timeout(240),
    pytest.mark.skipif(find_spec("ucxx") is None, reason="pip install 'trtllm-launch[ucx]'"),
]
OVER_UCX = r"prefill worker ready (?=.*transport=ucx\b)(?=.*wire=tcp\b)"
NUMBERS = range(6)


@pytest.fixture
def three() -> Iterator[Network]:
    with network(3) as made:
        yield made


def rehearsal(bench: Workbench, hosts: Network, **environ: str) -> Rehearsal:
    play = Rehearsal(bench, hosts)
    for one in play.environ:
        one |= {
            "DISCOVERY": (bench.path / "shared").as_uri(),
            "PREFILL_DISPATCH": "direct",
            "KV_TRANSPORT": "ucx",
            "CANARY_INTERVAL_S": "0",
        } | environ
    return play


def kill(part: Process) -> None:
    """Kill a part of the deployment and all that it started."""
    os.killpg(part.popen.pid, signal.SIGKILL)
    part.wait_end()


def test_tokens_are_those_of_an_aggregated_worker(bench: Workbench, three: Network) -> None:
    play = rehearsal(bench, three, ENGINE="torch")
    play.launch(1, "skeleton_disagg.sh ingress")
    aggregated = play.launch(2, "skeleton_agg.sh worker")
    play.ready()
    texts = [play.answer(number) for number in NUMBERS]
    aggregated.signal(signal.SIGTERM)
    assert aggregated.wait_end() == 0, aggregated.output
    decode = play.launch(2, "skeleton_disagg.sh decode")
    prefill = play.launch(3, "skeleton_disagg.sh prefill")
    decode.wait_line(OVER_UCX)
    play.ready()
    moved = play.metric("kv_transfers_total")
    assert [play.answer(number) for number in NUMBERS] == texts
    within(10, lambda: play.metric("kv_transfers_total") >= moved + len(NUMBERS))
    assert "eth0" in prefill.wait_line("ucx over TCP .*devices=.*").group()
    within(30, play.balanced)


def test_a_prefill_host_that_dies_under_load_takes_nobody_with_it(
    bench: Workbench, three: Network
) -> None:
    play = rehearsal(bench, three)
    play.launch(1, "skeleton_disagg.sh ingress")
    decode = play.launch(2, "skeleton_disagg.sh decode")
    prefill = play.launch(3, "skeleton_disagg.sh prefill")
    decode.wait_line(OVER_UCX)
    play.ready()
    texts = [play.answer(number) for number in NUMBERS]
    with ThreadPoolExecutor(len(NUMBERS)) as clients:
        asked = [clients.submit(play.answer, 100 + number) for number in range(4 * len(NUMBERS))]
        asked[len(NUMBERS)].result()
        kill(prefill)
        answers = [one.result() for one in asked]
    assert [play.answer(100 + number) for number in range(len(asked))] == answers
    assert [play.answer(number) for number in NUMBERS] == texts
    assert decode.popen.poll() is None
    moved = play.metric("kv_transfers_total")
    play.launch(3, "skeleton_disagg.sh prefill")

    def moves() -> bool:
        play.answer(int(time.monotonic() * 1000))
        return play.metric("kv_transfers_total") > moved

    within(60, moves)
    within(30, play.balanced)
    assert play.metric("leaked_blocks_total") == 0
