#!/usr/bin/env bash
# Aggregated serving with KV-aware routing: one ingress, workers that get the requests whose prefix they hold.
#
#   launch/agg_router.sh                                   # the demo model, two workers, no GPU needed
#   MODEL_PATH=~/Qwen3-0.6B NUM_WORKERS=4 launch/agg_router.sh
#   ROUTER_EVENTS=off launch/agg_router.sh                 # guess what is cached, without KV events
#   launch/agg_router.sh --dry-run                         # print every command, start nothing
#
# What is set already wins over what stands here, and a flag over both; --help lists all settings.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=find_command.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/find_command.sh"

export NUM_WORKERS="${NUM_WORKERS:-2}"
export ROUTER_MODE="${ROUTER_MODE:-${DYN_ROUTER_MODE:-kv}}"

exec "$cli" up "$@"
