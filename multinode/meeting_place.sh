# shellcheck shell=bash
# Sourced by start_*.sh: the parts of one job meet in one folder, unless something else is said.
if [[ -z "${DISCOVERY:-}${ETCD_ENDPOINTS:-}" ]]; then
  state="${XDG_STATE_HOME:-$HOME/.local/state}/trtllm-launch"
  export DISCOVERY="file://$state/job-${SLURM_JOB_ID:?this runs inside a SLURM job, under srun}"
fi
