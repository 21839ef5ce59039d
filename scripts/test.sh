#!/usr/bin/env bash
# Lints, type-checks and runs the whole suite, or with --fast what is not marked slow: three minutes on two idle cores.
# Other arguments go to pytest: bash scripts/test.sh --fast -k energy
set -euo pipefail
cd "$(dirname "$0")/.."
part=()
if [ "${1:-}" = --fast ]; then
  part=(-m "not slow" --hypothesis-profile=fast)
  shift
fi
bash scripts/bootstrap.sh test eval docs
if [ ${#part[@]} = 0 ] && ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  (apt-get update && apt-get install -y --no-install-recommends chromium) >/dev/null 2>&1 ||
    echo "test: chromium could not be installed; the tests of the app in a browser will skip themselves" >&2
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy & # the first time it takes as long as the fast tests
types=$!
trap 'kill "$types" 2>/dev/null || true' EXIT
# One thread a process: two workers with two threads each would fight for two cores.
OMP_NUM_THREADS=1 .venv/bin/pytest -n "${TEST_WORKERS:-2}" "${part[@]}" "$@"
wait "$types" || { echo "test: mypy found something, see above" >&2; exit 1; }
