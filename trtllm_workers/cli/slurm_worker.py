"""``trtllm-launch slurm worker``: one rank of a worker under somebody's own srun. Not listed in help.

``multinode/start_trtllm_worker.sh`` calls it on every rank; it ends by exec.
"""

from __future__ import annotations

import os
import sys

import click

_MODULE = "trtllm_workers.cli.main"
# Dynamo's words for a role.
_ROLES = {"prefill_and_decode": "aggregated", "agg": "aggregated", "": "aggregated"}


@click.command("worker", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> int:
    """Become one rank of a worker; WORDS are further arguments of the worker command."""
    from trtllm_workers.config.env import WORLD_SIZE, child_environment, environment
    from trtllm_workers.deploy.mpi import through_llmapi_launch
    from trtllm_workers.deploy.slurm.addresses import choose
    from trtllm_workers.errors import ConfigError

    here = environment()
    role = here.get("DISAGGREGATION_MODE", "").strip()
    role = _ROLES.get(role, role)
    if role not in ("aggregated", "prefill", "decode"):
        raise ConfigError(
            f"DISAGGREGATION_MODE is {role!r}; it must be prefill, decode or prefill_and_decode"
        )
    for name in ("MODEL_PATH", "ENGINE_CONFIG"):
        if not here.get(name, "").strip():
            raise ConfigError(f"set {name}: every rank of the worker needs it")
    if "SLURM_STEP_ID" not in here or "SLURM_NTASKS" not in here:
        raise ConfigError(
            "this runs under srun, which starts it once for each rank; in a shell take 'trtllm-launch worker'"
        )
    ranks = int(here["SLURM_NTASKS"])
    engine = here.get("ENGINE", "").strip() or "trtllm"
    worker_id = f"{role}-{here['SLURM_STEP_ID']}"
    arguments = [
        *("--role", role, "--worker-id", worker_id, "--engine", engine),
        *("--engine-config", here["ENGINE_CONFIG"], "--plane-host", "0.0.0.0"),
        *("--advertise-host", choose(None, here.get("SLURMD_NODENAME") or None).address),
        *words,
    ]
    extra: dict[str, str | None] = {}
    if ranks > 1:
        extra[WORLD_SIZE] = str(ranks)
    if engine == "trtllm":
        python = ("-P", "-m", _MODULE, "worker", *arguments)
        argv, more = through_llmapi_launch(sys.executable, python)
        argv, extra = ("trtllm-llmapi-launch", *argv), {**extra, **more}
    else:
        runner = ("-m", "mpi4py") if ranks > 1 else ()
        argv = (sys.executable, "-P", *runner, "-m", _MODULE, "worker", *arguments)
    try:
        os.execvpe(argv[0], list(argv), child_environment(extra))
    except OSError as wrong:
        raise ConfigError(f"cannot execute {argv[0]}: {wrong.strerror}") from wrong
