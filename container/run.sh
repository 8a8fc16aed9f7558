#!/usr/bin/env bash
# Run an image of trtllm-launch, with what serving on GPUs needs from the host.
#
#   container/run.sh --framework cpu -- launch/disagg.sh        # then ask http://127.0.0.1:8000
#   container/run.sh --hf-cache ~/.cache/huggingface -v /models:/models:ro -e MODEL_PATH=/models/m -- launch/agg.sh
#   container/run.sh --mount-workspace                          # a shell, with this checkout in place of the image's
#   container/run.sh --dry-run -- launch/agg.sh                 # print the command, start nothing
#
#   --image NAME           default trtllm-launch:VERSION-FRAMEWORK, for --target that
#   --framework NAME       trtllm (default), torch or cpu
#   --target STAGE         as it was given to build.sh
#   --name NAME            of the container
#   --gpus WHICH           all, none, or device=0,1; default all, with --framework cpu none
#   --hf-cache DIR         Hugging Face's cache for the container; passes HF_TOKEN on, by name
#   -v, --volume SRC:DST   repeatable
#   -e, --env NAME=VALUE   repeatable; a NAME with TOKEN, SECRET or PASSWORD in it never shows its value
#   -it                    a terminal
#   --rm TRUE|FALSE        remove the container when it ends; default TRUE
#   --entrypoint PROGRAM   instead of the image's
#   --privileged           all rights on this host
#   --mount-workspace      this checkout at /workspace, run from source; with -it, --hf-cache and a shell
#   --engine NAME          docker or podman; default: the first of them on PATH
#   --dry-run              print the command and end
#   -- COMMAND             what to run, e.g. launch/disagg.sh, trtllm-launch doctor
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

flags=(--image --framework --target --name --gpus --hf-cache --volume --env -it --rm --entrypoint --privileged
  --mount-workspace --engine --dry-run --help)
framework="" image="" target="" name="" gpus="" hf_cache="" entrypoint="" engine="auto" dry=""
remove=true privileged=false workspace="" terminal=""
volumes=() variables=() words=()

# A secret given as NAME=VALUE goes on by name: the command line of a process is for every user to read.
add_variable() {
  local variable="${1%%=*}"
  if [[ "$1" =~ ^[A-Za-z_][A-Za-z0-9_]*= && "${variable^^}" =~ TOKEN|SECRET|PASSWORD ]]; then
    export "$variable=${1#*=}"
    variables+=(--env "$variable")
  else
    variables+=(--env "$1")
  fi
}

while (($#)); do
  flag="$1"
  if [[ "$flag" == --*=* ]]; then # --flag=value is --flag value
    set -- "${flag%%=*}" "${flag#*=}" "${@:2}"
    flag="$1"
  fi
  case "$flag" in
    -h | --help) show_help && exit ;;
    --dry-run) dry=yes && shift && continue ;;
    -it) terminal=yes && shift && continue ;;
    --mount-workspace) workspace=yes && shift && continue ;;
    --rm | --privileged)
      choice=true
      if is_boolean "${2:-}"; then choice="${2,,}" && shift; fi
      if [[ "$flag" == --rm ]]; then remove="$choice"; else privileged="$choice"; fi
      shift && continue
      ;;
    --) shift && words=("$@") && break ;;
    -v | -e) ;;
    -*) [[ " ${flags[*]} " == *" $flag "* ]] || unknown_flag "$flag" ;;
    *) fail "'$flag' is no flag; put -- before the command to run" ;;
  esac
  (($# > 1)) || fail "$flag needs a value; --help says which"
  case "$flag" in
    --image) image="$2" ;;
    --framework) framework="$(framework_named "$2")" ;;
    --target) target="$2" ;;
    --name) name="$2" ;;
    --gpus) gpus="$2" ;;
    --hf-cache) hf_cache="$2" ;;
    -v | --volume) volumes+=(--volume "$2") ;;
    -e | --env) add_variable "$2" ;;
    --entrypoint) entrypoint="$2" ;;
    --engine) engine="$2" ;;
  esac
  shift 2
done

if [[ -z "$framework" && ("$target" == cpu || "$target" == torch) ]]; then framework="$target"; fi
framework="${framework:-trtllm}"
image="${image:-trtllm-launch:$TRTLLM_LAUNCH_VERSION-${target:-$framework}}"
if [[ -z "$gpus" ]]; then gpus=all && [[ "$framework" != cpu ]] || gpus=none; fi
if [[ -n "$workspace" ]]; then
  terminal=yes
  ((${#words[@]})) || words=(bash)
  # The image's command with the checkout's sources, and not a .venv in the checkout, which is the host's.
  volumes+=(--volume "$root:/workspace")
  variables+=(--env PYTHONPATH=/workspace --env TRTLLM_LAUNCH_VENV=/usr/local)
  [[ -n "$hf_cache" || ! -d "${HOME:-}/.cache/huggingface" ]] || hf_cache="$HOME/.cache/huggingface"
fi
if [[ -n "$hf_cache" && "$hf_cache" != none ]]; then
  [[ -d "$hf_cache" ]] || fail "--hf-cache $hf_cache: there is no such folder"
  hf_cache="$(cd -- "$hf_cache" && pwd)"
  volumes+=(--volume "$hf_cache:/home/launch/.cache/huggingface")
  variables+=(--env HF_HOME=/home/launch/.cache/huggingface)
  [[ -z "${HF_TOKEN:-}" ]] || variables+=(--env HF_TOKEN)
fi
engine="$(engine_among "$engine" "$dry" docker podman)"

command=("$engine" run)
[[ "$remove" == false ]] || command+=(--rm)
[[ -z "$terminal" ]] || command+=(-it)
[[ -z "$name" ]] || command+=(--name "$name")
case "$engine $gpus" in
  *" none") ;;
  "docker device="*) command+=(--gpus "\"$gpus\"") ;; # in quotes of its own, or the comma ends the option
  docker*) command+=(--gpus "$gpus") ;;
  "podman all" | "podman device="*) # names devices as the NVIDIA container toolkit does
    IFS=, read -ra devices <<<"${gpus#device=}"
    for device in "${devices[@]}"; do command+=(--device "nvidia.com/gpu=$device"); done
    ;;
  *) fail "--gpus $gpus: for $engine it is one of all, none, device=0,1" ;;
esac
# The host's network: RDMA devices, and ports of other hosts' choosing. An ingress listens on loopback until
# HTTP_HOST says otherwise.
command+=(--network host)
# UCX, NCCL and MPI share memory between processes, and other containers on this host may be their peers.
# podman refuses a size for what is the host's own.
command+=(--ipc host)
[[ "$engine" == podman ]] || command+=(--shm-size=10G)
# RDMA registers memory that must stay; TensorRT-LLM needs deep stacks; every stream is an open file.
command+=(--ulimit memlock=-1 --ulimit stack=67108864 --ulimit nofile=65536:65536)
# UCX and NIXL read KV from another process's memory (cross-memory attach), which the kernel treats as tracing.
command+=(--cap-add CAP_SYS_PTRACE)
# Longer than the drain timeout (30 s): engines kill after ten seconds.
command+=(--stop-timeout 60)
[[ "$privileged" == false ]] || command+=(--privileged)
[[ -z "$entrypoint" ]] || command+=(--entrypoint "$entrypoint")
command+=("${volumes[@]}" "${variables[@]}" --workdir /workspace "$image" "${words[@]}")

[[ -n "$dry" ]] && as_shell "${command[@]}" && exit
exec "${command[@]}"
