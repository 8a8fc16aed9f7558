"""Links and servers that go away for a while: answers stay right, nothing leaks, all resumes by itself."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.e2e.guide import Step
from tests.e2e.harness import Workbench
from tests.e2e.hosts import Network, needs_hosts, network
from tests.e2e.rehearsal import Rehearsal, within

TRANSPORTS = [
    pytest.param(
        "ucx",
        marks=pytest.mark.skipif(find_spec("ucxx") is None, reason="ucxx is not installed"),
    ),
    "tcp",
]
pytestmark = [needs_hosts, pytest.mark.timeout(240)]


@pytest.fixture
def three() -> Iterator[Network]:
    with network(3) as made:
        yield made


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_prefill_host_that_is_cut_off_and_comes_back(
    bench: Workbench, three: Network, transport: str
) -> None:
    play = Rehearsal(bench, three)
    for environ in play.environ:
        environ |= {
            "DISCOVERY": (bench.path / "shared").as_uri(),
            "PREFILL_DISPATCH": "direct",
            "KV_TRANSPORT": transport,
            "CANARY_INTERVAL_S": "0",
        }
    play.launch(1, "skeleton_disagg.sh ingress")
    decode = play.launch(2, "skeleton_disagg.sh decode")
    play.launch(3, "skeleton_disagg.sh prefill")
    play.ready()
    texts = [play.answer(number) for number in range(4)]
    three.plug(three.hosts[2], into=False)
    # The first one waits for the prefill worker until it is given up; none fails or differs.
    assert [play.answer(number) for number in range(4)] == texts
    assert [play.answer(9) for _ in range(2)] == [play.answer(9)] * 2
    decode.wait_line("prompt is computed here after all")
    three.plug(three.hosts[2], into=True)
    decode.wait_line(rf"prefill worker ready (?=.*transport={transport}\b)(?=.*wire=tcp\b)")
    play.ready()
    moved = play.metric("kv_transfers_total")

    def moves() -> bool:
        play.answer(int(time.monotonic() * 1000))
        return play.metric("kv_transfers_total") > moved

    within(30, moves)
    assert [play.answer(number) for number in range(4)] == texts
    within(30, play.balanced)
    assert play.metric("leaked_blocks_total") == 0


@pytest.mark.skipif(shutil.which("etcd") is None, reason="apt-get install etcd-server")
def test_etcd_that_is_away_stops_nothing(bench: Workbench, three: Network) -> None:
    play = Rehearsal(bench, three)
    etcd = Step(
        1,
        f"exec etcd --data-dir {bench.path}/etcd --listen-client-urls http://0.0.0.0:2379 "
        "--advertise-client-urls http://host1:2379",
    )
    server = play.start(etcd)
    server.wait_line("ready to serve client requests")
    for environ in play.environ:
        environ["ETCD_ENDPOINTS"] = "http://host1:2379"
    parts = [
        play.launch(1, "skeleton_agg.sh ingress"),
        play.launch(2, "skeleton_agg.sh worker"),
        play.launch(3, "skeleton_agg.sh worker"),
    ]
    play.ready()
    texts = [play.answer(number) for number in range(4)]
    server.signal(signal.SIGKILL)
    server.wait_end()
    parts[1].wait_line("etcd cannot be used")
    away_s = time.monotonic()
    while time.monotonic() - away_s < 15:  # longer than leases live
        assert [play.answer(number) for number in range(4)] == texts
    server = play.start(etcd)
    server.wait_line("ready to serve client requests")
    for part in parts[1:]:
        part.wait_line("etcd works again")
    back_s = time.monotonic()
    while time.monotonic() - back_s < 12:  # nobody is believed dead when the old leases end
        assert [play.answer(number) for number in range(4)] == texts
    late = play.launch(2, "skeleton_agg.sh worker --worker-id late")
    late.wait_line("registered ")
    told = Step(1, "curl -s http://host1:8000/router")
    assert play.until(told, '"late"').count('"state":"ready"') == 3
    assert all(part.popen.poll() is None for part in parts)


def test_a_wrong_address_of_etcd_is_said_with_what_to_do(bench: Workbench, tmp_path: Path) -> None:
    ended = bench.run("worker", "--engine", "sim", "--etcd-endpoints", "http://127.0.0.1:1")
    assert ended.popen.returncode == 2
    assert "127.0.0.1:1" in ended.output
    assert "refused" in ended.output
