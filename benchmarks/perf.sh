#!/usr/bin/env bash
# Measures a deployment that runs: a sweep of concurrencies with prompts and answers of fixed length.
#
#   benchmarks/perf.sh --isl 1000 --osl 100                          # of http://localhost:8000
#   benchmarks/perf.sh --mode disaggregated --prefill-tp 2 --prefill-dp 1 --decode-tp 2 --decode-dp 1
#   URL=http://host1:8000 CONCURRENCY=1,8,64 benchmarks/perf.sh      # variables, which flags override
#
# Takes URL, MODEL, ISL, OSL, CONCURRENCY, MODE, ARTIFACTS_ROOT_DIR and DEPLOYMENT_KIND from the environment
# and every flag of trtllm-launch bench run; benchmarks/perf.sh --help lists them. TRTLLM_LAUNCH_VENV names
# another environment.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=../launch/find_command.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../launch/find_command.sh"

words=()
for name in URL MODEL ISL OSL CONCURRENCY MODE ARTIFACTS_ROOT_DIR DEPLOYMENT_KIND; do
  flag="${name,,}"
  if [[ -n "${!name:-}" ]]; then words+=("--${flag//_/-}" "${!name}"); fi
done

exec "$cli" bench run "${words[@]}" "$@"
