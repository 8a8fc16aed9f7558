from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.bench.fake_server import FakeServer
from trtllm_workers.bench.client import Client
from trtllm_workers.bench.clients import Own
from trtllm_workers.bench.connection import Target
from trtllm_workers.bench.prompts import Prompts, Words
from trtllm_workers.bench.workload import Load, Workload
from trtllm_workers.errors import ConfigError, StartError

Serve = Callable[[FakeServer], FakeServer]


def client(timeout_s: float = 5.0) -> Client:
    return Client(Target("http://h:1"), timeout_s=timeout_s)


def bodies(count: int) -> list[bytes]:
    message = [{"role": "user", "content": "a b"}]
    return [
        json.dumps({"messages": message, "max_tokens": 3, "stream": True, "n": n}).encode()
        for n in range(count)
    ]


async def test_a_closed_loop_keeps_its_streams_busy_and_its_connections(serve: Serve) -> None:
    server = serve(FakeServer())
    async with client() as one:
        records = await one.closed_loop(bodies(20), 4)
    assert [record.index for record in records] == list(range(20))
    assert [body["n"] for body in server.bodies] == list(range(20))
    assert all(len(record.chunks_s) == 3 and not record.problem for record in records)
    assert all(record.intended_s == record.start_s for record in records)
    assert (server.most_in_flight, server.num_connections) == (4, 4)


async def test_an_open_loop_counts_from_the_time_of_arrival(serve: Serve) -> None:
    serve(FakeServer())
    async with client() as one:
        records = await one.open_loop(bodies(5), [0.0, 0.001, 0.001, 0.002, 0.003])
    assert [record.intended_s for record in records] == [0.0, 0.001, 0.001, 0.002, 0.003]
    assert all(record.start_s >= record.intended_s for record in records)
    assert all(record.ttft_s >= record.start_s - record.intended_s for record in records)


async def test_a_kept_connection_that_the_server_closed_is_replaced(serve: Serve) -> None:
    calls = 0

    def close_the_second(method: str, path: str, body: dict[str, Any]) -> bytes | None:
        nonlocal calls
        calls += 1
        return b"" if calls == 2 else None

    server = serve(FakeServer(answer=close_the_second))
    async with client() as one:
        records = await one.closed_loop(bodies(3), 1)
    assert [record.problem for record in records] == ["", "", ""]
    assert (server.num_connections, calls) == (2, 4)


async def test_a_new_connection_that_breaks_is_a_failed_request(serve: Serve) -> None:
    serve(FakeServer(answer=lambda *_: b""))
    async with client() as one:
        (record,) = await one.closed_loop(bodies(1), 1)
    assert record.problem == "the server closed the connection"


async def test_what_is_no_http_is_a_failed_request(serve: Serve) -> None:
    serve(FakeServer(answer=lambda *_: b"SSH-2.0-OpenSSH\r\n"))
    async with client() as one:
        (record,) = await one.closed_loop(bodies(1), 1)
    assert record.problem.startswith("no HTTP")


async def test_a_silent_server_is_given_up(serve: Serve) -> None:
    serve(FakeServer(answer=lambda *_: b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"))
    async with client(timeout_s=0.01) as one:
        (record,) = await one.closed_loop(bodies(1), 1)
    assert record.problem == "no whole answer within 0.01 s"
    assert record.end_s > 0


async def test_a_warm_up_that_goes_wrong_altogether_ends_the_sweep(serve: Serve) -> None:
    serve(FakeServer(refused=("max_tokens",)))
    workload = Workload(isl=20, osl=4)
    prompts = Prompts("m", workload, Words({"a": 1, "b": 1}, 6, 5), ())
    async with client() as one:
        own = Own(one, prompts, workload)
        with pytest.raises(StartError, match=r"every warm-up request .* HTTP 400: unknown field"):
            await own.warm_up(Load(concurrency=2, num_requests=4, num_warmup=2), 1)


async def test_own_names_what_is_wrong_with_an_answer(serve: Serve, tmp_path: Any) -> None:
    serve(FakeServer())
    workload = Workload(isl=20, osl=4)
    prompts = Prompts("m", workload, Words({"a": 1, "b": 1}, 7, 5), ())  # one token off
    async with client() as one:
        load = Load(concurrency=2, num_requests=4, num_warmup=0)
        records, cpu_s = await Own(one, prompts, workload).measure(load, tmp_path, 1)
    assert {record.problem for record in records} == {"prompt of 19 tokens, not 20"}
    assert cpu_s is not None


@pytest.mark.parametrize("url", ["ftp://h", "http://", "http://h:port", "http://h:99999"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        Target(url)


def test_the_api_base_is_taken_for_the_server() -> None:
    target = Target("https://h/base/v1/")
    assert (target.url, target.port) == ("https://h/base", 443)
    assert target.request("GET", "/v1/models").startswith(
        b"GET /base/v1/models HTTP/1.1\r\nHost: h\r\n"
    )
