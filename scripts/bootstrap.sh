#!/usr/bin/env bash
# Makes .venv with the pinned set of constraints.txt: bash scripts/bootstrap.sh [EXTRA ...], as test, app or lora.
# Adds extras to a .venv that is up to date, keeps those of one that is not, and does nothing when nothing is missing.
# PYTHON=python3.12 bash scripts/bootstrap.sh chooses another interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${PYTHON:-}" ]; then
  for PYTHON in python3 python3.13 python3.12 python3.11 none; do
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
  done
fi
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "bootstrap: no Python 3.11 or newer found; install one or set PYTHON=/path/to/python" >&2
  exit 2
fi

# The stamp is written last: what .venv was made from, and its extras.
stamp="$("$PYTHON" -V) $(cat constraints.txt setup.cfg setup.py pyproject.toml | cksum)"
made="" had=""
if [ -x .venv/bin/perturbdiff ] && [ -f .venv/stamp ]; then
  made="$(sed -n 1p .venv/stamp)"
  had="$(sed -n 2p .venv/stamp)"
fi
extras="$(printf '%s\n' $had "$@" | sort -u | xargs)"
if [ "$made" = "$stamp" ] && [ "$extras" = "$had" ]; then
  exit 0
fi

install() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"
}
echo "bootstrap: installing into .venv with $("$PYTHON" -V)${extras:+ and the extras $extras}"
rm -f .venv/stamp
if [ "$made" != "$stamp" ]; then
  "$PYTHON" -m venv --clear .venv
  install --progress-bar on torch # first: whatever asks for torch later then finds this one
fi
install -e ".${extras:+[${extras// /,}]}"
printf '%s\n' "$stamp" "$extras" > .venv/stamp
