#!/usr/bin/env bash
# What an image starts after its init: the command that was given, from whatever folder.
#
#   docker run IMAGE launch/agg.sh                    # found in /workspace, wherever --workdir points
#   docker run IMAGE --dry-run                        # options alone are options of `trtllm-launch up`
set -euo pipefail

case "${1:-}" in
  "") set -- trtllm-launch --help ;;
  -*) set -- trtllm-launch up "$@" ;;
  /*) ;;
  */*) [[ -e "$1" || ! -e "/workspace/$1" ]] || set -- "/workspace/$1" "${@:2}" ;;
esac

# NVIDIA's images set up CUDA for old drivers in an entrypoint of their own, which also prints a banner:
# that goes to stderr, so that the output of our commands stays theirs.
nvidia=/opt/nvidia/nvidia_entrypoint.sh
if [[ -x "$nvidia" ]]; then
  exec "$nvidia" bash -c 'exec "$@" >&3 3>&-' bash "$@" 3>&1 >&2
fi
exec "$@"
