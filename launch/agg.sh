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

# shellcheck source-path=SCRIPTDIR source=find_command.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/find_command.sh"

exec "$cli" up "$@"
