#!/usr/bin/env bash
# Lints, type-checks and runs the whole suite. Arguments go to pytest: bash scripts/test.sh -k energy
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/bootstrap.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# One thread a process: two workers with two threads each would fight for two cores.
OMP_NUM_THREADS=1 .venv/bin/pytest -n "${TEST_WORKERS:-2}" "$@"
