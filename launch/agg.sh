#!/usr/bin/env bash
# Aggregated serving on one host: one ingress, one worker that does prefill and decode.
#
#   launch/agg.sh                                          # the demo model, no GPU needed
#   MODEL_PATH=~/Qwen3-0.6B HTTP_PORT=9000 launch/agg.sh   # a model of yours, another port
#   launch/agg.sh --dry-run                                # print every command, start nothing
#
# The command reads MODEL_PATH SERVED_MODEL_NAME AGG_ENGINE_ARGS ENGINE HTTP_PORT and others by
# itself; launch/agg.sh --help lists them all. TRTLLM_LAUNCH_VENV names another environment.
set -euo pipefail

root="$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)"

if [[ -n "${TRTLLM_LAUNCH_VENV:-}" ]]; then
  cli="$TRTLLM_LAUNCH_VENV/bin/trtllm-launch"
elif [[ -x "$root/.venv/bin/trtllm-launch" ]]; then
  cli="$root/.venv/bin/trtllm-launch"
else
  cli="$(type -P trtllm-launch || true)"
fi
if [[ ! -x "$cli" ]]; then
  echo "launch/agg.sh: no trtllm-launch${cli:+ at $cli}; run 'make setup' in $root first" >&2
  exit 2
fi
exec "$cli" up "$@"
