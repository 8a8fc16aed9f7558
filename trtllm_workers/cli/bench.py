"""``trtllm-launch bench``: measure a deployment, compare two measurements, judge disaggregation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from trtllm_workers.cli.bench_parts import (
    DefaultGroup,
    Up,
    run_until_ended,
    say,
    workload_of,
    workload_options,
)
from trtllm_workers.cli.options import GroupedCommand
from trtllm_workers.errors import ConfigError

_CONCURRENCY = "1,2,4,8,16,32,64,128,256"
_FAILED = 1
_COUNT = click.IntRange(1)


@click.group("bench", cls=DefaultGroup, context_settings={"show_default": True})
def command() -> None:
    """Measure a deployment, compare measurements, judge disaggregation.

    Options without a verb are those of 'run': trtllm-launch bench --url http://localhost:8000.
    docs/benchmarking.md says how figures are taken and what the files hold.
    """


@command.command("run", cls=GroupedCommand)
@click.option("--url", default="http://localhost:8000", help="Address of the ingress.")
@click.option(
    "--concurrency",
    default=_CONCURRENCY,
    metavar="N,N,…",
    help="Streams that ask again at once, by level.",
)
@click.option(
    "--request-rate",
    metavar="R,R,…",
    help="Instead: arrivals per second at random times (open loop).",
)
@click.option(
    "--requests-per-level",
    type=_COUNT,
    metavar="N",
    help="Requests measured.  [default: 10 × streams, or 30 s of arrivals]",
)
@click.option(
    "--warmup",
    type=click.IntRange(0),
    metavar="N",
    help="Requests before them.  [default: 2 × streams]",
)
@workload_options(3000, 150)
@click.option(
    "--mode",
    type=click.Choice(["aggregated", "disaggregated"]),
    help="What you take it for; checked.",
)
@click.option(
    "--tp",
    "--tensor-parallelism",
    type=_COUNT,
    metavar="N",
    help="Ranks of an aggregated worker; checked.",
)
@click.option(
    "--dp", "--data-parallelism", type=_COUNT, metavar="N", help="Aggregated workers; checked."
)
@click.option(
    "--prefill-tp",
    "--prefill-tensor-parallelism",
    type=_COUNT,
    metavar="N",
    help="Ranks of a prefill worker; checked.",
)
@click.option(
    "--prefill-dp",
    "--prefill-data-parallelism",
    type=_COUNT,
    metavar="N",
    help="Prefill workers; checked.",
)
@click.option(
    "--decode-tp",
    "--decode-tensor-parallelism",
    type=_COUNT,
    metavar="N",
    help="Ranks of a decode worker; checked.",
)
@click.option(
    "--decode-dp",
    "--decode-data-parallelism",
    type=_COUNT,
    metavar="N",
    help="Decode workers; checked.",
)
@click.option(
    "--deployment-kind", default="trtllm-launch", help="A name for deployment_config.json."
)
@click.option(
    "--client",
    type=click.Choice(["auto", "aiperf", "own"]),
    default="auto",
    help="auto takes aiperf where it is on PATH.",
)
@click.option(
    "--artifacts-root-dir",
    type=click.Path(path_type=Path),
    default=Path("artifacts_root"),
    help="Where artifacts_<n>/ is made.",
)
def run(**values: Any) -> int:
    """Measure throughput, TTFT and ITL of a deployment at several loads.

    Ends with 1 when more than 1 % of the requests of a level went wrong, with 2 when the deployment is
    not what --mode, --tp and the like say.
    """
    from trtllm_workers.bench.deployment import Stated
    from trtllm_workers.bench.sweep import Sweep, run_sweep
    from trtllm_workers.bench.workload import closed_loops, open_loops, parse_levels, parse_rates
    from trtllm_workers.config.env import environment

    counts = (values["requests_per_level"], values["warmup"])
    if values["request_rate"]:
        loads = open_loops(parse_rates(values["request_rate"]), *counts)
    else:
        loads = closed_loops(parse_levels(values["concurrency"]), *counts)
    stated = Stated(
        mode=values["mode"],
        **{
            name: values[name]
            for name in ("tp", "dp", "prefill_tp", "prefill_dp", "decode_tp", "decode_dp")
        },
    )
    sweep = Sweep(
        url=values["url"],
        model=values["model"],
        workload=workload_of(values),
        loads=loads,
        stated=stated,
        kind=values["deployment_kind"],
        client=values["client"],
        timeout_s=values["timeout_s"],
        tokenizer=values["tokenizer"],
        root=values["artifacts_root_dir"],
        path=environment().get("PATH"),
    )
    results, folder = run_until_ended(run_sweep(sweep, say))
    print(f"{folder / 'results.json'}\n{folder / 'results.svg'}")
    return 0 if all(level.valid for level in results.levels) else _FAILED


@command.command("compare", cls=GroupedCommand)
@click.argument("before", type=click.Path(path_type=Path), metavar="A.json")
@click.argument("after", type=click.Path(path_type=Path), metavar="B.json")
@click.option(
    "--fail-above",
    type=click.FloatRange(0),
    metavar="PERCENT",
    help="End with 1 when a figure became worse by more, noise aside.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE.svg",
    help="Write both into one picture.",
)
def compare(before: Path, after: Path, fail_above: float | None, output: Path | None) -> int:
    """Compare two results.json of 'bench run', level by level."""
    from trtllm_workers.bench.compare import as_table
    from trtllm_workers.bench.compare import compare as compared
    from trtllm_workers.bench.picture import overlay_picture
    from trtllm_workers.bench.results import read_results

    one, other = read_results(before), read_results(after)
    comparison = compared(one, other)
    for warning in comparison.warnings:
        print(f"trtllm-launch: note: {warning}", file=sys.stderr)
    print(as_table(comparison))
    if output is not None:
        _write(output, overlay_picture([("A", one), ("B", other)]))
        print(f"\n{output}")
    if fail_above is None:
        return 0
    worse = comparison.regressions(fail_above / 100)
    for row in worse:
        print(f"worse by {row.worse_by:.1%}: {row.figure} at {row.level}", file=sys.stderr)
    return _FAILED if worse or not comparison.rows else 0


@command.command("verdict", cls=GroupedCommand)
@click.option(
    "--workers", type=_COUNT, default=2, metavar="N", help="Workers of both, on this host."
)
@click.option(
    "--splits",
    metavar="P+D,…",
    help="Prefill and decode workers to try.  [default: all, three at most]",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "sim", "torch", "trtllm"]),
    default="auto",
    help="As for 'up'.",
)
@click.option(
    "--agg-url", metavar="URL", help="Instead: an aggregated deployment that runs already."
)
@click.option("--disagg-url", metavar="URL", help="And a disaggregated one on as many workers.")
@click.option("--concurrency", default="8,32", metavar="N,N,…", help="Streams, by level.")
@click.option(
    "--request-rate",
    metavar="R,R,…",
    help="Instead: arrivals per second at random times (open loop).",
)
@click.option(
    "--requests-per-level",
    type=_COUNT,
    metavar="N",
    help="Requests of a round.  [default: 4 × streams, 20 at least]",
)
@click.option(
    "--warmup",
    type=click.IntRange(0),
    metavar="N",
    help="Requests before them.  [default: the streams]",
)
@click.option(
    "--rounds",
    type=_COUNT,
    metavar="N",
    default=2,
    help="Rounds at each of the two visits of a deployment.",
)
@workload_options(1000, 100)
@click.option(
    "--ttft-ms",
    type=click.FloatRange(0),
    help="Objective: the better one has more requests within.",
)
@click.option("--itl-ms", type=click.FloatRange(0), help="Objective for the time between tokens.")
@click.option(
    "--artifacts-root-dir",
    type=click.Path(path_type=Path),
    default=Path("artifacts_root"),
    help="Where artifacts_<n>/ is made.",
)
@click.argument("up_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- UP_OPTIONS...]")
def verdict(up_options: tuple[str, ...], **values: Any) -> int:
    """Say whether aggregated or disaggregated serving is better here, and why.

    Starts both on the same number of workers, one after the other, and measures them in turn. Words after
    -- go to 'trtllm-launch up'. Ends with 1 when there is no verdict, or when greedy answers differ.
    """
    from trtllm_workers.bench.report import as_text, write_verdict
    from trtllm_workers.bench.started import Split, parse_splits, require_free, splits_of
    from trtllm_workers.bench.sweep import new_folder
    from trtllm_workers.bench.trial import Trial, try_splits, try_urls
    from trtllm_workers.bench.verdict import Objective
    from trtllm_workers.bench.workload import closed_loops, open_loops, parse_levels, parse_rates

    agg_url, disagg_url = values["agg_url"], values["disagg_url"]
    if bool(agg_url) != bool(disagg_url):
        raise ConfigError("give both --agg-url and --disagg-url, or none", param="agg_url")
    if agg_url and up_options:
        raise ConfigError(
            "nothing is started for --agg-url and --disagg-url: leave out what follows --"
        )
    require_free(up_options)
    objective = None
    if values["ttft_ms"] or values["itl_ms"]:
        objective = Objective(ttft_s=_seconds(values["ttft_ms"]), itl_s=_seconds(values["itl_ms"]))
    requests, warmup = values["requests_per_level"], values["warmup"]
    if values["request_rate"]:
        loads = open_loops(parse_rates(values["request_rate"]), requests, warmup)
    else:
        loads = [
            load
            for streams in parse_levels(values["concurrency"])
            for load in closed_loops(
                [streams], requests or max(20, 4 * streams), streams if warmup is None else warmup
            )
        ]
    workers = values["workers"]
    splits = parse_splits(values["splits"], workers) if values["splits"] else splits_of(workers)
    trial = Trial(
        workload=workload_of(values),
        loads=loads,
        objective=objective,
        model=values["model"],
        rounds=values["rounds"],
        timeout_s=values["timeout_s"],
        tokenizer=values["tokenizer"],
        folder=new_folder(values["artifacts_root_dir"]),
    )
    if agg_url:
        judged, notes = run_until_ended(try_urls(trial, agg_url, disagg_url, say))
    else:
        ways = [Split(aggregated=workers), *splits]
        up = Up(values["engine"], up_options, trial.folder / "runs")
        judged, notes = run_until_ended(try_splits(trial, ways, up.command, up.environ(), say))
        up.clear()
    write_verdict(trial.folder / "verdict.json", judged, notes)
    print("\n" + as_text(judged, notes))
    print(f"\n{trial.folder / 'verdict.json'}")
    return _FAILED if judged.outcome == "invalid" or judged.same_text is False else 0


def _seconds(milliseconds: float | None) -> float | None:
    return milliseconds / 1e3 if milliseconds else None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as wrong:
        raise ConfigError(
            f"cannot write {path}: {wrong.strerror or wrong}", param="output"
        ) from wrong
