#!/usr/bin/env bash
# Build an image of trtllm-launch from this checkout.
#
#   container/build.sh --framework trtllm            # on NVIDIA's TensorRT-LLM release image
#   container/build.sh --framework cpu --tag mine    # engines torch and sim, no GPU
#   container/build.sh --framework torch --dry-run   # print the command, build nothing
#
#   --framework NAME       trtllm (default), torch or cpu; TENSORRTLLM and TRTLLM mean trtllm
#   --platform PLATFORM    linux/amd64 or linux/arm64; default: that of this machine
#   --base-image IMAGE     instead of the one in versions.env; with or without :TAG
#   --base-image-tag TAG   another tag (or sha256:... digest) of it
#   --tag NAME             repeatable; default trtllm-launch:VERSION-FRAMEWORK, for --target that
#   --target STAGE         a stage of the Dockerfile; default: the framework's
#   --build-arg NAME=VALUE repeatable, wins over versions.env; NAME alone takes the variable's value
#   --pip-config FILE      a pip.conf for the build; it is in no layer of the image
#   --uid N, --gid N       user that the image runs as; default 1000
#   --no-cache             build every layer again
#   --cache-from, --cache-to REF   as the engine takes them; repeatable
#   --engine NAME          docker, podman or buildah; default: the first of them on PATH
#   --dry-run              print the command and end
#   -- WORDS               what follows goes to the engine as it is, e.g. -- --volume /wheels:/wheels:ro
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

flags=(--framework --platform --base-image --base-image-tag --tag --target --build-arg --pip-config --uid --gid
  --no-cache --cache-from --cache-to --engine --dry-run --help)
framework="" platform="" base="" base_tag="" target="" pip_config="" uid=1000 gid=1000
engine="auto" dry=""
tags=() given_args=() extra=()
while (($#)); do
  flag="$1"
  if [[ "$flag" == --*=* ]]; then # --flag=value is --flag value
    set -- "${flag%%=*}" "${flag#*=}" "${@:2}"
    flag="$1"
  fi
  case "$flag" in
    -h | --help) show_help && exit ;;
    --dry-run) dry=yes && shift && continue ;;
    --no-cache) extra+=(--no-cache) && shift && continue ;;
    --) shift && extra+=("$@") && break ;;
  esac
  [[ " ${flags[*]} " == *" $flag "* ]] || unknown_flag "$flag"
  (($# > 1)) || fail "$flag needs a value; --help says which"
  case "$flag" in
    --framework) framework="$(framework_named "$2")" ;;
    --platform) platform="$2" ;;
    --base-image) base="$2" ;;
    --base-image-tag) base_tag="$2" ;;
    --tag) tags+=("$2") ;;
    --target) target="$2" ;;
    --build-arg) given_args+=(--build-arg "$2") ;;
    --pip-config) pip_config="$2" ;;
    --uid) uid="$2" ;;
    --gid) gid="$2" ;;
    --cache-from | --cache-to) extra+=("$flag" "$2") ;;
    --engine) engine="$2" ;;
  esac
  shift 2
done

# A stage that is a framework's own says which; other stages (wheel, cpu-packages) belong to none.
case "$target" in
  cpu | torch | trtllm)
    [[ "${framework:-$target}" == "$target" ]] || fail "--target $target is not of --framework $framework"
    framework="$target"
    ;;
esac
framework="${framework:-trtllm}"
case "$platform" in
  "" | linux/amd64 | linux/arm64) ;;
  *) fail "--platform '$platform' is none of linux/amd64, linux/arm64" ;;
esac
for number in "$uid" "$gid"; do
  [[ "$number" =~ ^[1-9][0-9]*$ ]] || fail "--uid and --gid are numbers above 0, not '$number': images do not run as root"
done
[[ -z "$pip_config" || -r "$pip_config" ]] || fail "--pip-config $pip_config: there is no such file to read"
if [[ "${base##*/}" == *[:@]* && -n "$base_tag" ]]; then
  fail "--base-image $base has a tag already, and --base-image-tag gives another"
fi
# A base of one's own without a tag is the engine's to complete (`latest`); ours has the tag of versions.env.
case "$framework" in
  trtllm) default="$TRTLLM_IMAGE" default_tag="$TRTLLM_VERSION" ;;
  *) default="$BASE_IMAGE" default_tag="$BASE_IMAGE_TAG" ;;
esac
[[ -n "$base" || -n "$base_tag" ]] || base_tag="$default_tag"
base="${base:-$default}"
case "$base_tag" in
  "") ;;
  sha256:*) base+="@$base_tag" ;;
  *) base+=":$base_tag" ;;
esac
# Engines want a name for every FROM, also of stages that they do not build.
bases=("BASE_IMAGE=$BASE_IMAGE:$BASE_IMAGE_TAG" "TRTLLM_BASE_IMAGE=$TRTLLM_IMAGE:$TRTLLM_VERSION")
case "$framework" in
  trtllm) bases[1]="TRTLLM_BASE_IMAGE=$base" ;;
  *) bases[0]="BASE_IMAGE=$base" ;;
esac

target="${target:-$framework}"
((${#tags[@]})) || tags=("trtllm-launch:$TRTLLM_LAUNCH_VERSION-$target")
revision="$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)"
engine="$(engine_among "$engine" "$dry" docker podman buildah)"

command=("$engine" build)
case "$engine" in
  docker) command=(env DOCKER_BUILDKIT=1 "${command[@]}") ;; # the old builder knows no --mount
  podman) command+=(--format docker) ;;                      # the other format has no health checks
  buildah) command+=(--format docker --layers) ;;            # and it keeps no layers unless told to
esac
command+=(--file "$root/container/Dockerfile" --target "$target")
for tag in "${tags[@]}"; do command+=(--tag "$tag"); done
[[ -z "$platform" ]] || command+=(--platform "$platform")
[[ -z "$pip_config" ]] || command+=(--secret "id=pip_config,src=$pip_config")
case "$framework" in
  cpu) command+=(--build-arg "TORCH_CPU=torch==$TORCH_VERSION --index-url $TORCH_CPU_INDEX") ;;
  torch) command+=(--build-arg "TORCH_CUDA=torch==$TORCH_VERSION") ;;
  trtllm) command+=(--build-arg "TRTLLM_VERSION=$TRTLLM_VERSION") ;;
esac
if [[ "$framework" != trtllm ]]; then
  command+=(--build-arg "UCXX_VERSION=$UCXX_VERSION" --build-arg "NIXL_VERSION=$NIXL_VERSION")
fi
command+=(--build-arg "${bases[0]}" --build-arg "${bases[1]}" --build-arg "PIP_VERSION=$PIP_VERSION")
command+=(--build-arg "TRTLLM_LAUNCH_VERSION=$TRTLLM_LAUNCH_VERSION" --build-arg "REVISION=$revision")
command+=(--build-arg "USER_UID=$uid" --build-arg "USER_GID=$gid")
command+=("${given_args[@]}" "${extra[@]}" "$root")

[[ -n "$dry" ]] && as_shell "${command[@]}" && exit
exec "${command[@]}"
