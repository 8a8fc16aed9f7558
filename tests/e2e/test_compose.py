"""container/compose.yaml without an engine: its services on hosts of their own, from its own commands and checks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Process, Workbench
from tests.e2e.hosts import Host, Network, needs_hosts, network
from tests.shell.compose import FOLDER, services

SCRIPTS = Path(sys.executable).parent
pytestmark = [
    needs_hosts,
    pytest.mark.timeout(180),
    pytest.mark.skipif(shutil.which("etcd") is None, reason="apt-get install etcd-server"),
    pytest.mark.skipif(shutil.which("etcdctl") is None, reason="apt-get install etcd-client"),
    pytest.mark.skipif(shutil.which("tini") is None, reason="apt-get install tini"),
    pytest.mark.skipif(shutil.which("wget") is None, reason="apt-get install wget"),
]
HEALTHY_TIMEOUT_S = 60.0


class Composed:
    """Services of the compose file, each started on a host that bears its name."""

    def __init__(self, bench: Workbench, made: Network) -> None:
        self._bench = bench
        self._started: dict[str, Process] = {}
        self.services = services(bench.path)
        self.hosts = dict(zip(self.services, made.hosts, strict=True))
        names = "".join(f"{host.address} {name}\n" for name, host in self.hosts.items())
        for host in made.hosts:
            with (Path("/etc/netns") / host.namespace / "hosts").open("a") as file:
                file.write(names)

    def host(self, name: str) -> Host:
        return self.hosts[name]

    def words(self, words: list[str]) -> list[str]:
        """Return a command with this machine's paths for those inside the containers."""
        inside = {
            "trtllm-launch": str(SCRIPTS / "trtllm-launch"),
            "nats-server": str(SCRIPTS / "nats-server"),
            "trtllm-launch-health": str(FOLDER / "healthcheck.py"),
            "--data-dir=/data": f"--data-dir={self._bench.path / 'etcd'}",
            "/etc/nats/trtllm-launch.conf": str(self._bench.path / "nats.conf"),
        }
        return [inside.get(word, word) for word in words]

    def environ(self, name: str, **more: str) -> dict[str, str]:
        return {**self._bench.environ, **self.services[name].get("environment", {}), **more}

    def start(self, name: str) -> Process:
        """Start a service as the compose file has it."""
        config = (FOLDER / "nats.conf").read_text()
        (self._bench.path / "nats.conf").write_text(
            config.replace("/data", str(self._bench.path / "nats"))
        )
        words = self.words(self.services[name]["command"])
        # Processes, memory and init of its own, as in a container.
        alone = ("unshare", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc")
        words = [*alone, "tini", "-s", "--", *words]
        process = self.host(name).start(words, self.environ(name), self._bench.path)
        self._bench.started.append(process)
        self._started[name] = process
        return process

    def wait_workers(self, names: set[str]) -> None:
        """Wait until the ingress has them all: it is healthy as soon as one chain is up."""
        deadline = time.monotonic() + HEALTHY_TIMEOUT_S
        while True:
            health = json.loads(self.ask("ingress", "http://127.0.0.1:8000/health"))
            there = {one["worker_id"] for one in health["models"]["demo"]["workers"]}
            if there == names:
                return
            assert time.monotonic() < deadline, f"only {sorted(there)}\n{self._last_words()}"
            threading.Event().wait(0.2)

    def stop(self, *names: str) -> dict[str, Process]:
        """Send SIGTERM to process 1 of each container, as an engine does; return them ended."""
        for name in names:
            outside = self._started[name].popen.pid
            children = Path(f"/proc/{outside}/task/{outside}/children").read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGTERM)
        for name in names:
            self._started[name].wait_end()
        return {name: self._started[name] for name in names}

    def stop_all(self) -> None:
        self.stop(*(name for name, one in self._started.items() if one.popen.poll() is None))

    def _last_words(self) -> str:
        self.stop_all()
        ends = {name: process.lines[-25:] for name, process in self._started.items()}
        return "\n".join(f"== {name}\n" + "\n".join(lines) for name, lines in ends.items())

    def wait_healthy(self, name: str) -> None:
        """Ask by the service's own health check until it passes; its interval is for slower eyes."""
        kind, *words = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        deadline = time.monotonic() + HEALTHY_TIMEOUT_S
        while (said := self._check(name, words)) is not None:
            if time.monotonic() > deadline:
                pytest.fail(f"{name} is not healthy: {said}\n{self._last_words()}")
            threading.Event().wait(0.2)

    def _check(self, name: str, words: list[str]) -> str | None:
        """Return what a health check that failed said; None: it passed."""
        environ = self.environ(name, ETCDCTL_API="3")  # the default of 3.5, not of Debian's 3.4
        try:
            self.host(name).run(self.words(words), environ)
        except AssertionError as error:
            return str(error)
        return None

    def ask(self, host: str, *words: str) -> str:
        return self.host(host).run(["curl", "-sS", "-m", "30", *words], self._bench.environ)


@pytest.fixture
def composed(bench: Workbench) -> Iterator[Composed]:
    with network(7) as made:
        parts = Composed(bench, made)
        try:
            yield parts
        finally:
            parts.stop_all()


def test_the_health_checks_fail_before_and_pass_after_a_start(composed: Composed) -> None:
    for name in ("etcd", "nats"):
        words = composed.words(composed.services[name]["healthcheck"]["test"][1:])
        with pytest.raises(AssertionError, match="ended with"):
            composed.host(name).run(words, composed.environ(name, ETCDCTL_API="3"))
        composed.start(name)
        composed.wait_healthy(name)


def test_the_whole_deployment_serves_and_drains(composed: Composed) -> None:
    for name in ("etcd", "nats"):
        composed.start(name)
        composed.wait_healthy(name)
    ours = [name for name in composed.hosts if name not in ("etcd", "nats")]
    assert len(ours) == 5
    for name in ours:
        composed.start(name)
    composed.wait_healthy("ingress")
    body: dict[str, Any] = {
        "model": "demo",
        "temperature": 0,
        "messages": [{"role": "user", "content": "What is prefill?"}],
    }
    words = ("-H", "content-type: application/json", "-d", json.dumps(body))
    # From another host, as a published port reaches the ingress.
    answer = json.loads(composed.ask("etcd", "http://ingress:8000/v1/chat/completions", *words))
    assert "KV cache" in answer["choices"][0]["message"]["content"]
    composed.wait_workers({*ours} - {"ingress"})
    metrics = composed.ask("ingress", "http://127.0.0.1:8000/metrics")
    assert "prefill_fallbacks_total{cause" not in metrics
    for name, process in composed.stop(*ours).items():
        assert process.popen.returncode == 0, f"{name}: {process.output}"
        assert "draining" in process.output


def test_nats_lets_nobody_in_without_the_token(composed: Composed) -> None:
    composed.start("nats")
    composed.wait_healthy("nats")
    program = (
        "import asyncio, nats, sys\n"
        "async def main():\n"
        "    async def ignore(error): pass\n"
        "    try:\n"
        "        link = await nats.connect('nats://nats:4222', token=sys.argv[1], error_cb=ignore,\n"
        "            connect_timeout=5, max_reconnect_attempts=1, allow_reconnect=False)\n"
        "    except nats.errors.Error as error:\n"
        "        return print('refused', error)\n"
        "    print('in', (await link.jetstream().account_info()).streams)\n"
        "    await link.close()\n"
        "asyncio.run(main())\n"
    )
    token = composed.environ("prefill-0")["NATS_TOKEN"]
    for given, said in ((token, "in 0"), ("wrong", "refused")):
        printed = composed.host("prefill-0").run(
            [sys.executable, "-c", program, given], composed.environ("ingress")
        )
        assert printed.startswith(said), printed
