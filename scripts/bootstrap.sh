#!/usr/bin/env bash
# Makes .venv with the pinned set of constraints.txt. Does nothing when it is up to date.
# PYTHON=python3.12 bash scripts/bootstrap.sh chooses another interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${PYTHON:-}" ]; then
  for PYTHON in python3 python3.12 python3.11 none; do
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
  done
fi
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "bootstrap: no Python 3.11 or newer found; install one or set PYTHON=/path/to/python" >&2
  exit 2
fi

stamp="$("$PYTHON" -V) $(cat constraints.txt setup.cfg pyproject.toml | cksum)"
if [ -x .venv/bin/perturbdiff ] && [ "$(cat .venv/stamp 2>/dev/null)" = "$stamp" ]; then
  exit 0
fi

echo "bootstrap: installing into .venv with $("$PYTHON" -V)"
rm -f .venv/stamp
"$PYTHON" -m venv --clear .venv
# torch first: whatever asks for torch later then finds this one.
.venv/bin/python -m pip install --quiet --progress-bar on --disable-pip-version-check -c constraints.txt torch
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
echo "$stamp" > .venv/stamp
