"""``trtllm-launch doctor``: what this machine has and lacks for what ``up`` would start."""

from __future__ import annotations

from typing import Any

import click

from trtllm_workers.cli.common import explicit
from trtllm_workers.cli.options import GroupedCommand, table_options

OPTIONS = (
    "model_path",
    "engine",
    "engine_config",
    "overrides",
    "http_host",
    "http_port",
    "num_workers",
    "disaggregated",
    "num_prefill_workers",
    "num_decode_workers",
    "prefill_engine_config",
    "decode_engine_config",
    "kv_transport",
    "run_dir",
    "log_dir",
)


@click.command("doctor", cls=GroupedCommand)
@table_options(OPTIONS)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array for machines.")
def command(as_json: bool, **values: Any) -> int:
    """Check this machine: what is there, what is missing, how to get it.

    Takes the same flags and variables as 'up'. Ends with 0 unless something it needs is missing.
    """
    import msgspec

    from trtllm_workers.cli.common import roots_of_runs
    from trtllm_workers.config.env import environment
    from trtllm_workers.deploy.doctor import examine
    from trtllm_workers.deploy.findings import as_text
    from trtllm_workers.deploy.run import find_runs
    from trtllm_workers.errors import ConfigError

    environ = environment()
    roots, elsewhere = roots_of_runs(values["run_dir"], environ)
    runs = find_runs(roots, elsewhere=elsewhere)
    findings = examine(explicit(values), environ, runs, roots)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(findings), indent=2).decode())
    else:
        print(as_text(findings))
    return ConfigError.exit_code if any(one.level == "problem" for one in findings) else 0
