"""``trtllm-launch explain``: the router's decisions, asked of a running ingress."""

from __future__ import annotations

from typing import Any

import click

from trtllm_workers.cli.options import GroupedCommand, table_options

_TIMEOUT_S = 10.0


@click.command("explain", cls=GroupedCommand)
@click.argument("request_id", required=False)
@table_options(("run_dir",))
@click.option("--url", help="Address of the ingress.  [default: that of the only run on this host]")
@click.option("--last", type=click.IntRange(1, 1000), default=10, help="How many of the last ones.")
@click.option(
    "--body", type=click.File("rb"), help="Where would this request (JSON) go? - reads stdin."
)
@click.option("--json", "as_json", is_flag=True, help="Print what the ingress says, as JSON.")
def command(
    request_id: str | None,
    run_dir: str | None,
    url: str | None,
    last: int,
    body: Any,
    as_json: bool,
) -> int:
    """Say where the router sent requests, and why.

    With RUN's request id (x-request-id of the response, or the answer's id) that one, else the last.
    """
    import httpx
    import msgspec

    from trtllm_workers.cli.common import roots_of_runs
    from trtllm_workers.config.env import environment
    from trtllm_workers.deploy.explaining import as_text, error_of, url_of_run
    from trtllm_workers.deploy.run import find_runs
    from trtllm_workers.errors import ConfigError, StartError

    if request_id is not None and body is not None:
        raise ConfigError("give a request id or --body, not both", param="request_id")
    if url is None:
        roots, elsewhere = roots_of_runs(run_dir, environment())
        url = url_of_run(find_runs(roots, elsewhere=elsewhere))
    base = f"{url.rstrip('/')}/router"
    try:
        with httpx.Client(timeout=_TIMEOUT_S, trust_env=False) as http:
            if body is not None:
                response = http.post(f"{base}/explain", content=body.read())
            elif request_id is not None:
                response = http.get(f"{base}/decisions/{request_id}")
            else:
                response = http.get(f"{base}/decisions", params={"limit": last})
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise StartError(
            f"no ingress answers at {url}: {error}; is it up (trtllm-launch ps), and is --url right?"
        ) from error
    if response.is_error:
        raise ConfigError(error_of(response.content, response.status_code, url))
    told = msgspec.json.decode(response.content)
    print(msgspec.json.format(response.content, indent=2).decode() if as_json else as_text(told))
    return 0
