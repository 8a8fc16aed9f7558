# shellcheck shell=bash
# Sourced by build.sh and run.sh, which set `flags`: versions, frameworks, messages, and which engine there is.

root="$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)"
# shellcheck source-path=SCRIPTDIR source=versions.env
source "$root/container/versions.env"

# Say what is wrong and end with 2, as every command of this project does for a setting.
fail() {
  echo "${0##*/}: $1" >&2
  exit 2
}

# The comment at the top of the script, which starts with what it is and how to call it.
show_help() {
  local line
  while IFS= read -r line; do
    [[ "$line" == "#"* ]] || break
    [[ "$line" == "#!"* ]] || { line="${line#\#}" && printf '%s\n' "${line# }"; }
  done <"$0"
}

# Letters to insert, delete or replace to make the second word of the first.
distance() {
  local a="$1" b="$2" i j cost
  local -a last=() row=()
  for ((j = 0; j <= ${#b}; j++)); do last[j]=$j; done
  for ((i = 1; i <= ${#a}; i++)); do
    row=("$i")
    for ((j = 1; j <= ${#b}; j++)); do
      cost=$((last[j - 1] + 1))
      [[ "${a:i-1:1}" != "${b:j-1:1}" ]] || cost=$((cost - 1))
      ((last[j] + 1 >= cost)) || cost=$((last[j] + 1))
      ((row[j - 1] + 1 >= cost)) || cost=$((row[j - 1] + 1))
      row[j]=$cost
    done
    last=("${row[@]}")
  done
  echo "${last[${#b}]}"
}

# Refuse a flag, and name the nearest of `flags`: one that it begins, or one at most a third away.
unknown_flag() {
  local word="$1" flag best="" away least=$((${#1} / 3 + 1))
  # shellcheck disable=SC2154 # the script that sources this sets it
  for flag in "${flags[@]}"; do
    away="$(distance "$word" "$flag")"
    if ((${#word} > 3)) && [[ "$flag" == "$word"* ]]; then away=0; fi
    if ((away < least)); then best="$flag" && least="$away"; fi
  done
  [[ -z "$best" ]] || fail "unknown flag '$word'; did you mean '$best'?"
  fail "unknown flag '$word'; --help lists all"
}

# Whether a word is the yes or no that a switch may be followed by (--rm FALSE).
is_boolean() { [[ "${1,,}" == true || "${1,,}" == false ]]; }

# The image's name for a framework, by any name that people type for it.
framework_named() {
  case "${1,,}" in
    cpu | torch) printf '%s' "${1,,}" ;;
    trtllm | tensorrtllm | tensorrt-llm | tensorrt_llm) printf 'trtllm' ;;
    vllm | sglang) fail "--framework $1: this toolkit serves with TensorRT-LLM; choose trtllm, torch or cpu" ;;
    *) fail "--framework '$1' is none of trtllm, torch, cpu" ;;
  esac
}

# The first of these programs that is there, or what was asked for. A dry run shows the first in any case.
engine_among() {
  local wanted="$1" dry="$2" candidate
  shift 2
  for candidate in "$@"; do
    if [[ "$wanted" == "$candidate" ]] || { [[ "$wanted" == auto ]] && type -P "$candidate" >/dev/null; }; then
      [[ -n "$dry" ]] || type -P "$candidate" >/dev/null || fail "--engine $candidate: it is not on PATH"
      printf '%s' "$candidate"
      return
    fi
  done
  [[ "$wanted" == auto ]] || fail "--engine '$wanted' is none of $(printf '%s ' auto "$@")"
  [[ -z "$dry" ]] || { printf '%s' "$1" && return; }
  fail "no container engine on PATH (looked for $*); install Docker, or on Debian 'apt-get install podman'"
}

# A command as one line that can be pasted: words that need it in quotes.
as_shell() {
  local word line=""
  for word in "$@"; do
    [[ -n "$word" && "$word" != *[^a-zA-Z0-9_./:=,@%+-]* ]] || word="${word@Q}"
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}
