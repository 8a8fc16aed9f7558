# shellcheck shell=bash
# Sourced by the launchers here: what they take for granted where nobody says otherwise.

# large_model NAME=VALUE …: for engine trtllm, DeepSeek-R1 with wide expert parallelism on GB200 nodes of four
# GPUs, as these scripts always had it. A variable that is set stays, and one engine config that is set means
# another model: then nothing is taken for granted.
large_model() {
  local one name value
  [[ "${ENGINE:-trtllm}" == trtllm ]] || return 0
  for one in "$@"; do
    name="${one%%=*}"
    if [[ "$name" == *ENGINE_CONFIG && -n "${!name:-}" ]]; then
      return 0
    fi
  done
  if [[ -z "${MODEL_PATH:-}" ]]; then
    echo "multinode/$(basename -- "$0"): set MODEL_PATH to the model's folder, the same on all nodes" >&2
    echo "  (ENGINE=torch tries the cluster with the demo model, without a GPU)" >&2
    exit 2
  fi
  export ENGINE=trtllm NUM_GPUS_PER_NODE="${NUM_GPUS_PER_NODE:-4}"
  for one in "$@"; do
    name="${one%%=*}" value="${one#*=}"
    # shellcheck disable=SC2154 # find_command.sh sets root
    [[ "$name" != *ENGINE_CONFIG ]] || value="$root/engine_configs/$value"
    [[ -n "${!name:-}" ]] || export "$name=$value"
  done
}
