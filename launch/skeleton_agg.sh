#!/usr/bin/env bash
# A rehearsal of aggregated serving on several hosts, without a model and without a GPU: a step per host.
#
#   launch/skeleton_agg.sh ingress            # host 1: HTTP on port 8000, routed by what workers have cached
#   launch/skeleton_agg.sh worker             # hosts 2 and 3, and any other at any time
#   launch/skeleton_agg.sh worker --dry-run   # check and show every setting, start nothing
#
# All hosts need ETCD_ENDPOINTS (or DISCOVERY, a folder that they share) in common; launch/README.md goes
# through the steps. With ENGINE=torch or trtllm and MODEL_PATH the same steps serve a model.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=find_command.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/find_command.sh"

step="${1:-}"
export ENGINE="${ENGINE:-sim}" ROUTER_MODE="${ROUTER_MODE:-kv}" HTTP_HOST="${HTTP_HOST:-0.0.0.0}"
case "$step" in
  ingress) exec "$cli" ingress --plane-host 0.0.0.0 "${@:2}" ;;
  worker) exec "$cli" worker --worker-id "$(uname -n)" --plane-host 0.0.0.0 "${@:2}" ;;
esac
echo "usage: ${0##*/} ingress|worker [options of 'trtllm-launch ingress' or 'worker']" >&2
exit 2
