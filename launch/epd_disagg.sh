#!/usr/bin/env bash
# Images encoded apart: one ingress, an encode worker, a prefill worker that takes embeddings, a decode worker.
#
#   MODEL_PATH=~/Qwen2-VL-7B-Instruct launch/epd_disagg.sh   # GPUs: prefill 0, decode 1, encode 2
#   MODEL_PATH=~/tiny-vl launch/epd_disagg.sh                # no GPU: docs/images.md makes a tiny model
#   launch/epd_disagg.sh --dry-run                           # print every command, start nothing
#
# Requests may name files of the encode worker's host under ALLOWED_LOCAL_MEDIA_PATH: by default the temporary
# folder, set but empty none. What is set already wins over what stands here, and a flag over both; --help
# lists all settings.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=find_command.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/find_command.sh"

export MODALITY="${MODALITY:-multimodal}"
export NUM_ENCODE_WORKERS="${NUM_ENCODE_WORKERS:-1}"
# Unset and empty differ here: empty means no local file.
export ALLOWED_LOCAL_MEDIA_PATH="${ALLOWED_LOCAL_MEDIA_PATH-${TMPDIR:-/tmp}}"
export MAX_FILE_SIZE_MB="${MAX_FILE_SIZE_MB:-50}"

exec "$cli" up --disaggregated "$@"
