#!/usr/bin/env bash
# Build the image `cpu` for real and serve from it, and `trtllm` on a stand-in for NVIDIA's image, without a
# container engine's daemon and without a registry.
#
#   sudo container/check_build.sh
#   sudo container/check_build.sh --pip-config my.conf --build-arg TORCH_CPU=torch==2.13.0 -- --volume /wheels:/wheels:ro
#
# Words are passed to build.sh. Debian and Python packages come from wherever apt and pip get them. Needs root,
# and of Debian: buildah debootstrap iproute2. Takes 5 minutes and 6 GB in TMPDIR, which it gives back.
set -euo pipefail

root="$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)"
say() { echo "check: $*"; }
fail() {
  echo "check: FAILED: $*" >&2
  exit 1
}
for tool in buildah debootstrap unshare nsenter ip; do
  type -P "$tool" >/dev/null || { echo "check: $tool is missing; apt-get install buildah debootstrap util-linux iproute2" >&2 && exit 2; }
done
((EUID == 0)) || { echo "check: making and entering an image needs root" >&2 && exit 2; }

scratch="$(mktemp -d "${TMPDIR:-/var/tmp}/check-build.XXXXXX")"
server=""
clean_up() {
  [[ -z "$server" ]] || kill -KILL "$server" 2>/dev/null || true # with it goes its process namespace
  buildah rm --all >/dev/null 2>&1 || true
  buildah rmi --all --force >/dev/null 2>&1 || true
  umount "$scratch/storage/overlay" 2>/dev/null || true
  rm -rf -- "$scratch"
}
trap clean_up EXIT
export BUILDAH_ISOLATION=chroot CONTAINERS_STORAGE_CONF="$scratch/storage.conf"
printf '[storage]\ndriver = "overlay"\ngraphroot = "%s"\nrunroot = "%s"\n' "$scratch/storage" "$scratch/run" \
  >"$CONTAINERS_STORAGE_CONF"

say "making a base image of Debian 12 with debootstrap"
debootstrap --variant=minbase bookworm "$scratch/debian" >"$scratch/log" 2>&1 || { tail -20 "$scratch/log" && fail "debootstrap"; }
base="$(buildah from scratch)"
buildah add --quiet "$base" "$scratch/debian" / >/dev/null
buildah commit --quiet --rm "$base" localhost/debian:check >/dev/null
rm -rf -- "$scratch/debian"

# What also holds for other builds: pip's configuration, and words for the engine.
common=() engine_words=()
words=("$@")
while ((${#words[@]})); do
  case "${words[0]}" in
    --pip-config) common=(--secret "id=pip_config,src=${words[1]}") ;;
    --) engine_words=("${words[@]:1}") && break ;;
  esac
  words=("${words[@]:1}")
done

say "building"
started="$SECONDS"
build=("$root/container/build.sh" --engine buildah --framework cpu --base-image localhost/debian:check --tag localhost/check)
"${build[@]}" "$@" >"$scratch/log" 2>&1 || { tail -40 "$scratch/log" && fail "build.sh"; }
say "built in $((SECONDS - started)) s: $(buildah images --format '{{.Size}}' localhost/check)"
started="$SECONDS"
"${build[@]}" "$@" >"$scratch/log" 2>&1 || fail "the second build"
say "built again from its layers in $((SECONDS - started)) s"

open_image() { # open_image NAME: sets image, a folder
  image="$(buildah mount "$(buildah from "$1")")"
}
open_image localhost/check
setting() { buildah inspect --format "{{.Docker.Config.$1}}" --type image localhost/check; }
user="$(setting User)"
[[ "$user" == [1-9]*:[1-9]* ]] || fail "the image's user is '$user', not a number other than root's"
[[ "$(setting Healthcheck)" == *trtllm-launch-health* ]] || fail "the image has no health check"
[[ ! -e "$image/etc/pip.conf" ]] || fail "pip's configuration is in the image"

# A container in all but name: own processes, network (loopback alone), mounts and shared memory.
enter() { # enter FOLDER COMMAND...: as the image's user, with its entrypoint and no environment but PATH and HOME
  # shellcheck disable=SC2016 # expanded by the shell inside
  unshare --pid --net --mount --ipc --uts --fork --kill-child bash -c '
    set -euo pipefail
    ip link set lo up
    mount -t proc proc "$0/proc"
    mount -t sysfs sysfs "$0/sys"
    mount --rbind /dev "$0/dev"
    mount -t tmpfs tmpfs "$0/dev/shm"
    exec chroot --userspec="$1" "$0" /usr/bin/env -i -C "$2" \
      PATH=/usr/local/bin:/usr/bin:/bin HOME=/home/launch /usr/bin/tini -s -- /usr/local/bin/in-image "${@:3}"
  ' "$image" "$user" "$@"
}

say "launchers and commands, from any folder"
enter /workspace launch/disagg.sh --dry-run >/dev/null || fail "launch/disagg.sh --dry-run"
enter /tmp launch/agg.sh --dry-run >/dev/null || fail "launch/agg.sh from another folder"
enter /tmp --dry-run --http-port 9000 >/dev/null || fail "options alone"
# UCX before MPI: both bring libraries of one name.
enter /home/launch /opt/trtllm-launch/bin/python -c 'import ucxx, nixl_cu12._api, mpi4py.MPI, nats, aetcd' ||
  fail "a package is missing"
touched="$(enter / /bin/sh -c 'touch /workspace/x 2>&1 || true; id -u')"
[[ "$touched" == *ermission*"${user%%:*}" ]] || fail "not run as a user without rights: $touched"

say "serving disaggregated, KV moved by NIXL"
enter /tmp launch/disagg.sh --kv-transport nixl >"$scratch/served" 2>&1 &
server=$!
until [[ -n "${init:-}" && "$(readlink "/proc/$init/ns/pid")" != "$(readlink /proc/self/ns/pid)" ]]; do
  read -r init _ <"/proc/${init:-$server}/task/${init:-$server}/children" || true
  kill -0 "$server" || fail "it ended at once: $(tail -5 "$scratch/served")"
done
inside() { # inside COMMAND...: beside the server, as the image's user
  nsenter --target "$init" --pid --net --mount --ipc chroot --userspec="$user" "$image" /usr/bin/env -i \
    PATH=/usr/local/bin:/usr/bin:/bin HOME=/home/launch "$@"
}
ready_s=$((SECONDS + 120))
until inside trtllm-launch-health http://127.0.0.1:8000/ready 2>/dev/null; do
  kill -0 "$server" 2>/dev/null || { tail -20 "$scratch/served" && fail "it ended before it was ready"; }
  ((SECONDS < ready_s)) || { tail -20 "$scratch/served" && fail "not ready after 120 s"; }
  sleep 0.2
done
# shellcheck disable=SC2016 # as it stands in the Dockerfile
inside /bin/sh -c 'exec trtllm-launch-health http://127.0.0.1:${HTTP_PORT:-${DYN_HTTP_PORT:-8000}}/health' || fail "the health check"
answer="$(inside /opt/trtllm-launch/bin/python -c '
import httpx
body = {"model": "demo", "temperature": 0, "messages": [{"role": "user", "content": "What is prefill?"}]}
print(httpx.post("http://127.0.0.1:8000/v1/chat/completions", json=body, timeout=60).raise_for_status()
    .json()["choices"][0]["message"]["content"])
workers = httpx.get("http://127.0.0.1:8000/health", timeout=9).json()["models"]["demo"]["workers"]
assert {worker["kv_transport"] for worker in workers} == {"nixl"}, workers
')" || fail "it does not answer as it should"
say "it answers: $answer"

# A process whose parent has gone belongs to process 1, which must not leave it a zombie.
inside /bin/sh -c '/bin/true & exec /bin/true'
inside /bin/sh -c '(/bin/sleep 0.2 &)'
sleep 1
zombies="$(inside /bin/sh -c 'cat /proc/[0-9]*/stat' | grep -c ') Z ' || true)"
[[ "$zombies" == 0 ]] || fail "$zombies zombies"

started="$SECONDS"
kill -TERM "$init"
status=0
wait "$server" || status=$?
server=""
[[ "$status" == 0 ]] || { tail -20 "$scratch/served" && fail "exit code $status after TERM"; }
grep -q draining "$scratch/served" || fail "it did not drain"
say "TERM: drained and ended with 0 within $((SECONDS - started + 1)) s; no process, no zombie left"

say "building trtllm on a stand-in for NVIDIA's image, with NIXL and without"
stand_in() { # stand_in NAME [WORDS]
  buildah build --quiet --format docker --build-arg BASE_IMAGE=localhost/debian:check --build-arg TRTLLM_VERSION=1.2.1 \
    "${common[@]}" "${engine_words[@]}" --tag "localhost/$1" "${@:2}" "$root/tests/fakes/release_image" >"$scratch/log" 2>&1 ||
    { tail -20 "$scratch/log" && fail "the stand-in"; }
}
trtllm=("$root/container/build.sh" --engine buildah --framework trtllm --tag localhost/check-trtllm --build-arg TRTLLM_VERSION=1.2.1)
stand_in release
"${trtllm[@]}" --base-image localhost/release -- "${common[@]}" "${engine_words[@]}" >"$scratch/log" 2>&1 ||
  { tail -40 "$scratch/log" && fail "build.sh --framework trtllm"; }
open_image localhost/check-trtllm
shown="$(enter /tmp launch/disagg.sh --engine sim --kv-transport tcp --dry-run 2>"$scratch/log")" || { cat "$scratch/log" && fail "launch/disagg.sh --dry-run in trtllm"; }
[[ "$shown" != *banner* && "$(<"$scratch/log")" == *banner* ]] || fail "NVIDIA's banner is not where it belongs"
kept="$(enter / python3 -c 'import fastapi, numpy, aetcd, nats; print(numpy.__version__, fastapi.__version__)' 2>/dev/null)"
[[ "$kept" == "1.26.4 0.121.3" ]] || fail "packages of the image were replaced: $kept"
stand_in without-nixl --build-arg NIXL=libs/nothing
if "${trtllm[@]}" --base-image localhost/without-nixl -- "${common[@]}" "${engine_words[@]}" >"$scratch/log" 2>&1; then
  fail "it was built without NIXL"
fi
grep -q "NIXL itself is missing" "$scratch/log" || { tail -20 "$scratch/log" && fail "no reason for the end"; }
say "passed"
