"""The rehearsals of launch/README.md, step by step, each host a network namespace; and hosts that get lost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator

import pytest

from tests.e2e.guide import ROOT, Guide, Step, steps_of
from tests.e2e.harness import Process, Workbench
from tests.e2e.hosts import Network, needs_hosts, network

pytestmark = [
    needs_hosts,
    pytest.mark.timeout(240),
    pytest.mark.skipif(shutil.which("etcd") is None, reason="apt-get install etcd-server"),
]
README = ROOT / "launch" / "README.md"
AGGREGATED = "Aggregated: an ingress with its router, and two workers"
DISAGGREGATED = (
    "Disaggregated: an ingress, two decode workers, one prefill worker, and the queue between them"
)
TWO_HOSTS = "Two hosts: ingress, router and 8 decode workers here, 8 prefill workers there"


@pytest.fixture
def three() -> Iterator[Network]:
    with network(3) as made:
        yield made


def walk(guide: Guide, steps: list[Step]) -> Iterator[tuple[Step, Process | None, str]]:
    """Run steps in order; what serves is waited for until it does."""
    for step in steps:
        if not step.serves:
            ready = '"status":"ready"'
            if step.command.endswith("/ready"):
                yield step, None, guide.until(step, ready)
            elif step.command.endswith("/metrics"):  # workers tell theirs once a second
                yield step, None, guide.until(step, 'outcome="filled"')
            else:
                yield step, None, guide.run(step)
            continue
        process = guide.start(step)
        if step.command.startswith("etcd "):
            process.wait_line("ready to serve client requests")
        elif "nats-server" in step.command:
            process.wait_line("Server is ready")
        yield step, process, ""


def ended_well(processes: list[Process]) -> None:
    for process in processes:
        assert process.wait_end() == 0, process.output


def test_the_aggregated_rehearsal_goes_as_written(bench: Workbench, three: Network) -> None:
    guide = Guide(bench, three)
    parts: list[Process] = []
    answers: list[str] = []
    stopped = ""
    for step, process, printed in walk(guide, steps_of(README, AGGREGATED)):
        if process is not None and step.command.startswith("launch/"):
            parts.append(process)
        if "curl -si" in step.command:
            answers.append(printed)
        if " explain " in step.command:
            assert re.search(r"-0 +- +host[23] +\d+/\d+ ", printed), printed
        if " stop " in step.command:
            stopped = printed
    assert len(answers) == 2
    routes = [re.search(r"worker=(host\d) \(overlap (\d+)/", one) for one in answers]
    assert routes[0]
    assert routes[1]
    assert routes[0][1] == routes[1][1], "the second goes where the first one's prompt is"
    assert int(routes[0][2]) == 0
    assert int(routes[1][2]) >= 32
    texts = [json.loads(one.partition("\n\n")[2])["choices"][0]["text"] for one in answers]
    assert texts[0] == texts[1]
    assert "ended ingress" in stopped
    assert "host2@10.99.0.2" in stopped
    ended_well(parts)


def test_the_disaggregated_rehearsal_goes_as_written(bench: Workbench, three: Network) -> None:
    guide = Guide(bench, three)
    parts: list[Process] = []
    for step, process, printed in walk(guide, steps_of(README, DISAGGREGATED)):
        if process is not None and step.command.startswith("launch/"):
            parts.append(process)
        if "/v1/completions" in step.command:
            assert json.loads(printed)["usage"]["completion_tokens"] == 8
        if step.command.endswith("/metrics"):
            done = re.search(r'prefill_queue_jobs_total{[^}]*outcome="filled"[^}]*} [1-9]', printed)
            assert done, "a prompt went through the queue"
            assert "trtllm_launch_prefill_fallbacks_total{cause" not in printed, printed
    ended_well(parts)


def test_sixteen_workers_on_two_hosts_while_requests_flow(bench: Workbench, three: Network) -> None:
    guide = Guide(bench, three)
    before = [one for one in steps_of(README, DISAGGREGATED) if "launch/" not in one.command]
    for step in before[: next(at for at, one in enumerate(before) if "curl" in one.command)]:
        list(walk(guide, [step]))
    steps = steps_of(README, TWO_HOSTS)
    body = {
        "model": "demo",
        "prompt": "Prompts flow while workers join. " * 8,
        "max_tokens": 8,
        "temperature": 0,
    }
    ask = Step(
        3,
        f"curl -s -m 30 http://host1:8000/v1/completions -H 'content-type: application/json' -d {json.dumps(json.dumps(body))}",
    )
    for step, _, _ in walk(guide, [one for one in steps if " stop " not in one.command]):
        if step.command.endswith("/ready"):
            wanted = re.compile(r'"state":"ready"')
            texts = set()
            for _ in range(20):
                answer = json.loads(guide.run(Step(3, ask.command)))
                assert "choices" in answer, answer
                texts.add(answer["choices"][0]["text"])
            assert len(texts) == 1, "whoever made it, the answer is the same"
            count = 0
            while count < 16:
                told = guide.run(Step(2, "curl -s http://host1:8000/router"))
                count = len(wanted.findall(told))
    closing = next(one for one in steps if " stop " in one.command)
    assert guide.run(closing).count("decode-") == 16  # asked, and ended
