#!/usr/bin/env bash
# Disaggregated serving on one host: one ingress, a prefill worker, and a decode worker that takes its KV.
#
#   launch/disagg.sh                                             # the demo model, no GPU needed
#   MODEL_PATH=~/Qwen3-0.6B KV_TRANSPORT=nixl launch/disagg.sh   # a model of yours, moved by NIXL
#   launch/disagg.sh --dry-run                                   # print every command, start nothing
#
# The command reads MODEL_PATH DISAGGREGATION_STRATEGY PREFILL_ENGINE_ARGS DECODE_ENGINE_ARGS
# PREFILL_CUDA_VISIBLE_DEVICES DECODE_CUDA_VISIBLE_DEVICES and others by itself; launch/disagg.sh --help
# lists them all. TRTLLM_LAUNCH_VENV names another environment.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=find_command.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/find_command.sh"

exec "$cli" up --disaggregated "$@"
