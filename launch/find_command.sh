# shellcheck shell=bash
# Sourced by every launcher: sets root (this checkout) and cli (the trtllm-launch to run), or ends with 2.
# First TRTLLM_LAUNCH_VENV, then .venv of this checkout, then PATH.

root="$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)"

if [[ -n "${TRTLLM_LAUNCH_VENV:-}" ]]; then
  cli="$TRTLLM_LAUNCH_VENV/bin/trtllm-launch"
elif [[ -x "$root/.venv/bin/trtllm-launch" ]]; then
  cli="$root/.venv/bin/trtllm-launch"
else
  cli="$(type -P trtllm-launch || true)"
fi
if [[ ! -x "$cli" ]]; then
  launcher="$(readlink -f -- "$0")"
  echo "${launcher#"$root"/}: no trtllm-launch${cli:+ at $cli}; run 'make setup' in $root first" >&2
  exit 2
fi
