#!/usr/bin/env bash
# gpt-oss-120b on one host of eight GPUs: an ingress, a prefill worker and a decode worker of four GPUs each.
#
#   MODEL_PATH=~/gpt-oss-120b launch/gpt_oss_disagg.sh       # the checkpoint lies there; default /model
#   ENGINE=sim MODEL_PATH=DIR launch/gpt_oss_disagg.sh       # rehearse the same configs, no GPU needed
#   launch/gpt_oss_disagg.sh --dry-run                       # print every command, start nothing
#
# What is set already wins over what stands here, and a flag over both; --help lists all settings.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=find_command.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/find_command.sh"

export MODEL_PATH="${MODEL_PATH:-/model}"
export SERVED_MODEL_NAME="${SERVED_MODEL_NAME:-openai/gpt-oss-120b}"
export DISAGGREGATION_STRATEGY="${DISAGGREGATION_STRATEGY:-prefill_first}"
export PREFILL_ENGINE_ARGS="${PREFILL_ENGINE_ARGS:-$root/engine_configs/gpt_oss/prefill.yaml}"
export DECODE_ENGINE_ARGS="${DECODE_ENGINE_ARGS:-$root/engine_configs/gpt_oss/decode.yaml}"
export PREFILL_CUDA_VISIBLE_DEVICES="${PREFILL_CUDA_VISIBLE_DEVICES:-0,1,2,3}"
export DECODE_CUDA_VISIBLE_DEVICES="${DECODE_CUDA_VISIBLE_DEVICES:-4,5,6,7}"
export START_TIMEOUT_S="${START_TIMEOUT_S:-1800}" # 65 GB of weights take their time from a slow disk
# Kernels start while the ones before them end; weights are read one by one, in little host memory.
export TRTLLM_ENABLE_PDL="${TRTLLM_ENABLE_PDL:-1}"
export TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL="${TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL:-True}"

exec "$cli" up --disaggregated "$@"
