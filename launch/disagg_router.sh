#!/usr/bin/env bash
# Disaggregated serving with KV-aware routing: requests go first to the prefill worker that holds their prefix.
#
#   launch/disagg_router.sh                                # the demo model, two workers of each role, no GPU
#   NUM_PREFILL_WORKERS=4 launch/disagg_router.sh
#   PREFILL_DISPATCH=queue DISAGGREGATION_STRATEGY=decode_first launch/disagg_router.sh
#   launch/disagg_router.sh --dry-run                      # print every command, start nothing
#
# What is set already wins over what stands here, and a flag over both; --help lists all settings.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=find_command.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/find_command.sh"

export DISAGGREGATION_STRATEGY="${DISAGGREGATION_STRATEGY:-prefill_first}"
export NUM_PREFILL_WORKERS="${NUM_PREFILL_WORKERS:-2}"
export NUM_DECODE_WORKERS="${NUM_DECODE_WORKERS:-2}"
export ROUTER_MODE="${ROUTER_MODE:-${DYN_ROUTER_MODE:-kv}}"

exec "$cli" up --disaggregated "$@"
