"""A launcher in a process of its own, for tests that kill it: runs the plan of a JSON file.

python drive.py PLAN.json; ends as the command line does, with the error's message and exit code.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from trtllm_workers.deploy import supervise, up
from trtllm_workers.deploy.output import Terminal
from trtllm_workers.deploy.plan import Plan, PlannedProcess
from trtllm_workers.deploy.run import RunFolder
from trtllm_workers.errors import LaunchError


def plan_of(spec: dict[str, object]) -> Plan:
    folder = RunFolder(Path(str(spec["folder"])))
    log_dir = Path(str(spec["log_dir"])) if spec.get("log_dir") else folder.logs
    processes = spec["processes"]
    assert isinstance(processes, dict)
    num_ranks = spec.get("num_ranks", {})
    assert isinstance(num_ranks, dict)
    return Plan(
        run_id=folder.run_id,
        folder=folder,
        processes=tuple(
            PlannedProcess(
                name=name,
                role="ingress" if name == "ingress" else "aggregated",
                argv=tuple(argv),
                cwd=Path.cwd(),
                log=Path(str(spec.get("log", log_dir / f"{name}.log"))),
                status=folder.status(name),
                num_ranks=num_ranks.get(name, 1),
                term_to_leader=name in spec.get("term_to_leader", ()),  # type: ignore[operator]
            )
            for name, argv in processes.items()
        ),
        model="fake",
        http_host="127.0.0.1",
        http_port=0,
        discovery="file:///nowhere",
        log_dir=log_dir,
        keeps_logs=bool(spec.get("log_dir")),
        start_timeout_s=float(str(spec.get("start_timeout_s", 20.0))),
        drain_timeout_s=float(str(spec.get("drain_timeout_s", 5.0))),
        max_restarts=int(str(spec.get("max_restarts", 0))),
    )


async def no_pause(_seconds: float) -> None:
    """Start again at once."""


async def endless_pause(_seconds: float) -> None:
    await asyncio.Event().wait()


def main() -> int:
    terminal = Terminal(sys.stdout.fileno())
    try:
        spec = json.loads(Path(sys.argv[1]).read_text())
        plan = plan_of(spec)
        if spec.get("hasty"):  # shorter graces for tests that use them up
            supervise._LAST_STAGE_S = up._CLOSE_GRACE_S = 0.3
        pause = endless_pause if spec.get("endless_pause") else no_pause
        return asyncio.run(up.run_plan(plan, dict(os.environ), terminal, pause))
    except LaunchError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    finally:
        terminal.close()


if __name__ == "__main__":
    sys.exit(main())
