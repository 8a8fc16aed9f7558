#!/usr/bin/env bash
# Disaggregated serving on SLURM: an ingress, prefill workers and decode workers, each on whole nodes.
#
#   salloc --nodes=8 …                                  # then, in its shell:
#   MODEL_PATH=/models/DeepSeek-R1 IMAGE=… multinode/srun_disaggregated.sh
#   multinode/srun_disaggregated.sh                     # outside an allocation: submits a job that does it
#   ENGINE=torch multinode/srun_disaggregated.sh        # the demo model on CPUs, to try the cluster
#
# NUM_PREFILL_NODES and NUM_DECODE_NODES are those of each worker; NUM_PREFILL_WORKERS and NUM_DECODE_WORKERS
# say how many there are. DISAGGREGATION_STRATEGY is decode_first or prefill_first.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=../launch/find_command.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../launch/find_command.sh"

# shellcheck source-path=SCRIPTDIR source=defaults.sh
source "$root/multinode/defaults.sh"
large_model PREFILL_ENGINE_CONFIG=deepseek_r1/wide_ep/wide_ep_prefill.yaml NUM_PREFILL_NODES=4 \
  DECODE_ENGINE_CONFIG=deepseek_r1/wide_ep/wide_ep_decode.yaml NUM_DECODE_NODES=4

exec "$cli" slurm run --disaggregated "$@"
