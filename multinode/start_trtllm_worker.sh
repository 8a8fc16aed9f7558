#!/usr/bin/env bash
# One rank of one worker of a deployment whose parts you start by your own sruns: a task for each rank.
#
#   srun --overlap --mpi=pmix --nodes=4 --ntasks-per-node=4 multinode/start_trtllm_worker.sh
#
# Needs MODEL_PATH and ENGINE_CONFIG. DISAGGREGATION_MODE is prefill, decode or prefill_and_decode (the default).
# ENGINE=torch runs the embedded engine. Arguments go to 'trtllm-launch worker'.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=../launch/find_command.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../launch/find_command.sh"

# shellcheck source-path=SCRIPTDIR source=meeting_place.sh
source "$root/multinode/meeting_place.sh"
exec "$cli" slurm worker "$@"
