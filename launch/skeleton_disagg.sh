#!/usr/bin/env bash
# A rehearsal of disaggregated serving on several hosts, without a model and without a GPU: a step per host.
#
#   launch/skeleton_disagg.sh ingress             # host 1: HTTP on port 8000
#   launch/skeleton_disagg.sh decode              # hosts 1 and 2; prompts wait in the queue for prefill
#   launch/skeleton_disagg.sh prefill             # host 3, and any other: takes prompts from the queue
#   launch/skeleton_disagg.sh prefill --dry-run   # check and show every setting, start nothing
#
# All hosts need ETCD_ENDPOINTS (or DISCOVERY, a folder that they share) and NATS_SERVER in common;
# launch/README.md goes through the steps. PREFILL_DISPATCH=direct does without the queue and NATS.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=find_command.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/find_command.sh"

role="${1:-}"
export ENGINE="${ENGINE:-sim}" ROUTER_MODE="${ROUTER_MODE:-kv}" HTTP_HOST="${HTTP_HOST:-0.0.0.0}"
export PREFILL_DISPATCH="${PREFILL_DISPATCH:-queue}" KV_TRANSPORT="${KV_TRANSPORT:-auto}"
case "$role" in
  ingress) exec "$cli" ingress --plane-host 0.0.0.0 "${@:2}" ;;
  prefill | decode)
    exec "$cli" worker --role "$role" --worker-id "$role-$(uname -n)" --plane-host 0.0.0.0 "${@:2}"
    ;;
esac
echo "usage: ${0##*/} ingress|decode|prefill [options of 'trtllm-launch ingress' or 'worker']" >&2
exit 2
