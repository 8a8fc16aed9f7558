#!/usr/bin/env bash
# The ingress of a deployment whose parts you start by your own sruns: one task, on the head node.
#
#   srun --overlap --nodelist=HEAD --nodes=1 --ntasks=1 multinode/start_frontend_services.sh
#
# Workers (start_trtllm_worker.sh) find it in a folder of the job that all nodes see, or in etcd when
# ETCD_ENDPOINTS says where. multinode/srun_*.sh do all of this by themselves.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=../launch/find_command.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../launch/find_command.sh"

if [[ "${SLURM_PROCID:-0}" != 0 ]]; then
  echo "multinode/start_frontend_services.sh: it is one task; this is rank $SLURM_PROCID, which has nothing to do" >&2
  exit 0
fi
# shellcheck source-path=SCRIPTDIR source=meeting_place.sh
source "$root/multinode/meeting_place.sh"
exec "$cli" ingress --plane-host 0.0.0.0 --http-host "${HTTP_HOST:-0.0.0.0}" "$@"
