#!/usr/bin/env bash
# Aggregated serving on SLURM: an ingress, and workers that each take whole nodes.
#
#   salloc --nodes=4 …                                  # then, in its shell:
#   MODEL_PATH=/models/DeepSeek-R1 IMAGE=… multinode/srun_aggregated.sh
#   multinode/srun_aggregated.sh                        # outside an allocation: submits a job that does it
#   ENGINE=torch multinode/srun_aggregated.sh           # the demo model on CPUs, to try the cluster
#
# NUM_NODES and NUM_GPUS_PER_NODE are those of each worker; NUM_WORKERS says how many there are. IMAGE empty
# takes the software on the nodes. multinode/README.md is the guide, --help lists everything.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=../launch/find_command.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../launch/find_command.sh"

# shellcheck source-path=SCRIPTDIR source=defaults.sh
source "$root/multinode/defaults.sh"
large_model ENGINE_CONFIG=deepseek_r1/wide_ep/wide_ep_agg.yaml NUM_NODES=4

exec "$cli" slurm run "$@"
