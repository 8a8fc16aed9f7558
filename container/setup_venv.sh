#!/usr/bin/env bash
# Make an empty virtual environment with a Python this project runs on (3.11 or 3.12).
#
#   container/setup_venv.sh .venv
#   PYTHON=/usr/bin/python3.11 container/setup_venv.sh .venv
set -euo pipefail

target="${1:?usage: container/setup_venv.sh DIR}"
fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'

python=""
for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3; do
  if "$candidate" -c "$fits" >/dev/null 2>&1; then
    python="$candidate"
    break
  fi
done
if [[ -z "$python" ]]; then
  echo "setup: Python 3.11 or 3.12 is needed and none was found (python3 is: $(python3 --version 2>&1 || true))." >&2
  echo "setup: on Debian 12 run 'apt-get install python3 python3-venv', or set PYTHON=/path/to/python3.11." >&2
  exit 2
fi

# Debian and Ubuntu ship Python without the part that makes environments.
if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
  minor="$("$python" -c 'import sys; print(f"python3.{sys.version_info[1]}-venv")')"
  if [[ "$(id -u)" != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "setup: $python cannot make virtual environments; run 'sudo apt-get install $minor' and try again." >&2
    exit 2
  fi
  echo "setup: installing Debian's $minor (Python came without it)"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$minor" >/dev/null
fi

echo "setup: making $target with $("$python" --version)"
"$python" -m venv "$target"
"$target/bin/python" -m pip install -q --upgrade 'pip>=25.1'
