"""Steps for several hosts as a guide has them: read from its text, run as they stand, each on its host."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.harness import Process, Workbench
from tests.e2e.hosts import Network

ROOT = Path(__file__).parents[2]
_STEP = re.compile(r"^(host\d)\$ (.+)$")
# What runs until it is ended.
_SERVERS = ("etcd ", ".venv/bin/nats-server ", "launch/", "for ")


@dataclass(frozen=True)
class Step:
    """One line of a guide."""

    host: int
    command: str

    @property
    def serves(self) -> bool:
        return self.command.startswith(_SERVERS)


def steps_of(guide: Path, heading: str) -> list[Step]:
    """Return the steps under a heading, in order."""
    text = guide.read_text()
    assert f"\n### {heading}\n" in text, f"{guide} has no '{heading}'"
    part = text.split(f"\n### {heading}\n", 1)[1].split("\n### ", 1)[0]
    blocks = re.findall(r"```console\n(.*?)```", part, re.DOTALL)
    found = [_STEP.match(line) for block in blocks for line in block.splitlines()]
    assert found
    assert all(found), "every line of such a block names its host"
    return [Step(int(one[1][4:]), one[2]) for one in found if one]


class Guide:
    """Runs steps on hosts. Variables that a step exports hold for the later ones of its host."""

    def __init__(self, bench: Workbench, network: Network) -> None:
        self.bench = bench
        self._network = network
        base = bench.environ | {"HOME": str(bench.path), "PATH": bench.environ["PATH"]}
        self.environ = [dict(base) for _ in network.hosts]

    def start(self, step: Step) -> Process:
        """Start what serves."""
        host, environ = self._network.hosts[step.host - 1], self.environ[step.host - 1]
        process = host.start(["bash", "-c", step.command], environ, ROOT)
        self.bench.started.append(process)
        return process

    def run(self, step: Step) -> str:
        """Run a step to its end; return what it printed."""
        environ = self.environ[step.host - 1]
        if step.command.startswith("export "):
            words = shlex.split(step.command)[1:]
            environ.update(word.partition("=")[::2] for word in words)
            return ""
        host = self._network.hosts[step.host - 1]
        return host.run(["bash", "-c", step.command], environ)

    def until(self, step: Step, wanted: str, timeout_s: float = 60) -> str:
        """Run a step until it prints ``wanted``."""
        wait = f"until {step.command} | grep -q {shlex.quote(wanted)}; do sleep 0.2; done"
        loop = Step(
            step.host, f"timeout {timeout_s:g} bash -c {shlex.quote(wait)} && {step.command}"
        )
        return self.run(loop)
