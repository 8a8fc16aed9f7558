#!/usr/bin/env python3
"""Ask an ingress whether it is well, with nothing but Python: exit code 0 for HTTP 200, else 1.

trtllm-launch-health http://127.0.0.1:8000/health
"""

import http.client
import sys
import urllib.error
import urllib.request

_TIMEOUT_S = 4.0  # below the five seconds after which an engine calls the check itself dead


def main() -> int:
    """Ask once; say on stderr what was wrong, which `docker inspect` shows."""
    url = sys.argv[1]
    # No proxy: the ingress is in this container.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as answer:
            status = int(answer.status)
    except urllib.error.HTTPError as refused:
        status = refused.code
    except (OSError, http.client.HTTPException) as error:
        sys.stderr.write(f"{url}: {error}\n")
        return 1
    if status != 200:
        sys.stderr.write(f"{url}: HTTP {status}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
