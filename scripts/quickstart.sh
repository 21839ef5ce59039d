#!/usr/bin/env bash
# From a fresh clone to a trained model and its scores: bash scripts/quickstart.sh [perturbdiff demo options]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/bootstrap.sh # what the demo needs, and no more
exec .venv/bin/perturbdiff demo "$@"
