"""NVIDIA's aiperf as the client: a command line for it, and its records read as ours. Starts nothing.

Written against the files of aiperf 0.13.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from trtllm_workers.bench.answer import error_of
from trtllm_workers.bench.records import Record, problem_of
from trtllm_workers.bench.workload import Load, Workload
from trtllm_workers.errors import ConfigError, StartError

EXPORT = "profile_export_aiperf.json"
RECORDS = "profile_export.jsonl"
_NS = 1e-9
_MS = 1e-3
# aiperf draws as many words as its own tokenizer calls so many tokens; a server may count a few more.
_ISL_SLACK = 0.02
_ISL_SLACK_TOKENS = 4


def argv(
    program: str,
    *,
    url: str,
    model: str,
    tokenizer: Path | None,
    workload: Workload,
    load: Load,
    template_tokens: int,
    ending: dict[str, Any],
    timeout_s: float,
    seed: int,
    folder: Path,
) -> list[str]:
    """Return the command that measures one level into ``folder``.

    ``template_tokens`` is what the server's chat template adds to a prompt, ``ending`` the fields that keep
    an answer from ending early.
    """
    own_tokens = workload.isl - workload.shared_prefix - template_tokens
    if own_tokens < 1:
        raise ConfigError(f"--isl {workload.isl} leaves no token for a prompt", param="isl")
    words = [program, "profile", "--model", model, "--endpoint-type", "chat", "--streaming"]
    if tokenizer is not None:
        words += ["--tokenizer", str(tokenizer)]
    words += ["--url", url, "--use-server-token-count"]
    words += ["--synthetic-input-tokens-mean", str(own_tokens)]
    words += ["--synthetic-input-tokens-stddev", "0"]
    words += ["--output-tokens-mean", str(workload.osl), "--output-tokens-stddev", "0"]
    if workload.shared_prefix:
        words += ["--shared-system-prompt-length", str(workload.shared_prefix)]
    for name, value in ending.items():
        words += ["--extra-inputs", f"{name}:{str(value).lower()}"]
    if load.concurrency is not None:
        words += ["--concurrency", str(load.concurrency)]
    else:
        words += ["--request-rate", f"{load.request_rate:g}", "--request-rate-mode", "poisson"]
    words += ["--request-count", str(load.num_requests)]
    if load.num_warmup:
        words += ["--warmup-request-count", str(load.num_warmup)]
    words += ["--num-dataset-entries", str(load.num_requests + load.num_warmup)]
    words += ["--request-timeout-seconds", f"{timeout_s:g}", "--random-seed", str(seed)]
    return [*words, "--ui", "none", "--artifact-dir", str(folder)]


def read(folder: Path, workload: Workload) -> tuple[list[Record], str]:
    """Return the measured requests that aiperf left in ``folder``, and its version ("" if not told).

    Raises StartError when its files are not there or not what is known of them.
    """
    path = folder / RECORDS
    try:
        lines = [msgspec.json.decode(line) for line in path.read_bytes().splitlines() if line]
    except OSError as wrong:
        raise StartError(
            f"aiperf left no {path}: {wrong.strerror or wrong}; see its output above, "
            "or measure with --client own"
        ) from wrong
    except msgspec.DecodeError as wrong:
        raise StartError(f"{path} cannot be read: {wrong}; measure with --client own") from wrong
    try:
        measured = [one for one in lines if one["metadata"]["benchmark_phase"] == "profiling"]
        began_ns = min((one["metadata"]["request_start_ns"] for one in measured), default=0)
        records = [_record(index, one, began_ns, workload) for index, one in enumerate(measured)]
    except (KeyError, TypeError, IndexError, ValueError) as wrong:
        raise StartError(
            f"{path} has another form than that of aiperf 0.13 ({type(wrong).__name__}: {wrong}); "
            "measure with --client own"
        ) from wrong
    if not records:
        raise StartError(f"{path} holds no measured request; measure with --client own")
    return records, _version(folder / EXPORT)


def _record(index: int, told: Any, began_ns: int, workload: Workload) -> Record:
    metadata, metrics = told["metadata"], told["metrics"]
    start_s = (metadata["request_start_ns"] - began_ns) * _NS
    record = Record(
        index=index,
        intended_s=start_s,
        start_s=start_s,
        end_s=(metadata["request_end_ns"] - began_ns) * _NS,
    )
    if error := told.get("error"):
        record.problem = f"HTTP {error.get('code')}: {error_of(str(error['message']).encode())}"
        return record
    if metadata.get("was_cancelled"):
        record.problem = "no whole answer within the time limit"
        return record
    record.prompt_tokens = _tokens(metrics, "usage_prompt_tokens")
    record.output_tokens = _tokens(metrics, "usage_completion_tokens")
    record.cached_tokens = _tokens(metrics, "usage_prompt_cache_read_tokens")
    if "time_to_first_token" in metrics:
        at_s = start_s + metrics["time_to_first_token"]["value"] * _MS
        record.chunks_s.append(at_s)
        for gap_ms in metrics.get("inter_chunk_latency", {}).get("value", ()):
            at_s += gap_ms * _MS
            record.chunks_s.append(at_s)
    # It tells no finish_reason; the number of tokens says whether an answer ran to its end.
    record.finish_reason = "length" if record.output_tokens == workload.osl else "stop"
    slack = max(_ISL_SLACK_TOKENS, round(_ISL_SLACK * workload.isl))
    record.problem = problem_of(record, workload, isl_slack=slack)
    return record


def _tokens(metrics: Any, name: str) -> int:
    return int(metrics[name]["value"]) if name in metrics else 0


def _version(path: Path) -> str:
    try:
        return str(msgspec.json.decode(path.read_bytes())["aiperf_version"])
    except (OSError, msgspec.DecodeError, KeyError, TypeError):
        return ""
